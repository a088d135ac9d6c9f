//! Fused optimizers: the clip is part of the update.
//!
//! [`AdamW`] and [`Sgd`] replace candle's optimizers, alone or in a
//! [`ClippedOptimizer`](crate::ClippedOptimizer), also two of them in a [`Pair`]. The wrapper
//! recognizes them by type and passes
//! its edit (coefficient, bound, zeroing of non-finite elements) to the update. Each gradient is
//! read once for the norm and once for the step. On CPU and CUDA no gradient is written, and
//! nothing of its size is allocated. The memory traffic is 8 words per parameter for clip and
//! AdamW, 4 for clip and SGD. A skipped step changes neither weights, moments nor the step counter.
//! [`StepReport::path`](crate::StepReport::path) is then
//! [`StepPath::Fused`](crate::StepPath::Fused).
//!
//! # Precision
//! f64 Vars are updated in f64. f32, f16 and bf16 Vars are updated in f32, with moments in f32, and
//! the result is rounded once, to nearest. Without `master_weights(true)`, an update smaller than
//! half a ULP of its weight is lost: a bf16 weight has 8 significant bits, so updates below 1/512
//! of it vanish in every step. With it, an f32 copy of each half-precision Var accumulates the
//! updates, and the Var is its rounded value. This takes 4 more bytes per parameter.
//!
//! # In place
//! On CPU, and on CUDA with this crate's kernels, Vars are updated in place. Tensors that share
//! their storage see the update, as with `Var::set`. Otherwise candle's operations compute all new
//! values before the first Var is set.
//!
//! # Checkpoints
//! [`AdamW::save`] and [`Sgd::save`], or [`ClippedOptimizer::save`](crate::ClippedOptimizer::save)
//! with its [`Clip`](crate::Clip) and its counters, write one safetensors file. After `load`
//! training continues bit for bit. The file does **not have the weights**: save them with candle's
//! [`VarMap::save`](candle_nn::VarMap::save). [`Checkpoints`](crate::Checkpoints) saves both, of one
//! moment, and keeps more than one.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_grad_clip::optim::AdamW;
//! use candle_grad_clip::{Clip, ClippedOptimizer};
//! use candle_nn::{Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
//!
//! fn model() -> anyhow::Result<(VarMap, candle_nn::Linear, ClippedOptimizer<AdamW>)> {
//!     let varmap = VarMap::new();
//!     let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
//!     let linear = candle_nn::linear(4, 1, vb)?;
//!     let opt = AdamW::from_named_vars(&varmap, ParamsAdamW::default())?;
//!     let opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?;
//!     Ok((varmap, linear, opt))
//! }
//!
//! # fn main() -> anyhow::Result<()> {
//! # let folder = std::env::temp_dir().join(format!("candle-grad-clip-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&folder)?;
//! let x = Tensor::ones((8, 4), DType::F32, &Device::Cpu)?;
//! let (varmap, linear, mut opt) = model()?;
//! opt.backward_step(&linear.forward(&x)?.sqr()?.mean_all()?)?;
//! varmap.save(folder.join("model.safetensors"))?;
//! opt.save(folder.join("optimizer.safetensors"))?;
//! opt.backward_step(&linear.forward(&x)?.sqr()?.mean_all()?)?;
//! let weights = linear.weight().to_vec2::<f32>()?;
//!
//! // In another process, some day:
//! let (mut varmap, linear, mut opt) = model()?;
//! varmap.load(folder.join("model.safetensors"))?;
//! opt.load(folder.join("optimizer.safetensors"))?;
//! opt.backward_step(&linear.forward(&x)?.sqr()?.mean_all()?)?;
//! assert_eq!(linear.weight().to_vec2::<f32>()?, weights);
//! # std::fs::remove_dir_all(folder)?;
//! # Ok(())
//! # }
//! ```
//!
//! State is matched by the Vars' **names**. The names of a `Vec<Var>` are its indices (`var.0`,
//! `var.1`, ...), and the order of `VarMap::all_vars` differs between processes. So saving and
//! loading with these names is an error. Use `from_named_vars(&varmap, ..)`, or wrap with
//! `&varmap`. If the order is always the same, use
//! [`NamedVars::by_place`](crate::NamedVars::by_place).
//!
//! Like PyTorch's `load_state_dict`, `load` restores the saved hyper-parameters and the saved
//! `Clip`. To change them, call `set_learning_rate`, `set_params` or `set_clip` after `load`. The
//! options that are chosen when an optimizer is made (`amsgrad`, `master_weights`) must be the same
//! as in the file. If a file does not fit, nothing is changed, and the error lists all differences.
//!
//! `save` writes a temporary file in the same folder, syncs it to the disk and renames it. A save
//! that fails (a full disk) or is killed leaves the old file intact. If several processes save to
//! one path, even in different containers or machines, the last one wins, with a complete file. A
//! killed save leaves `.<name>.<32 hexadecimal digits>.tmp`, which a save to the same path removes
//! after a day. A symbolic link is followed, and a file keeps its mode. A checksum (CRC-32) of each
//! array and of the metadata detects a damaged file. NaN or infinite state is saved only by
//! `save_non_finite`.
//!
//! # Failure
//! Hyper-parameters, shapes, dtypes and devices are checked before the first write. A step that
//! returns an error has changed nothing, except after a GPU fault that shows only later.

mod adamw;
mod fused;
mod grouped_optimizer;
mod pair;
mod param_states;
mod params;
mod sgd;
mod shared;
mod update;

use std::any::Any;

pub use crate::groups::{ParamGroup, ParamGroups};
pub use adamw::AdamW;
pub(crate) use fused::{Fused, FusedParts, Loaded};
pub use grouped_optimizer::GroupedOptimizer;
pub use pair::{Pair, PairConfig};
pub(crate) use param_states::{ParamStates, Snapshot};
pub use params::ParamsSgd;
pub(crate) use params::{OtherSettings, Settings};
pub use sgd::Sgd;
pub(crate) use update::GradEdits;

mod sealed {
    /// Only optimizers of this crate know how to save what a wrapper adds.
    pub trait Sealed: 'static {}
}

/// Optimizers that a [`ClippedOptimizer`](crate::ClippedOptimizer) can save and load with its own
/// state: [`AdamW`], [`Sgd`], a [`Pair`] of these, and no others (the trait is sealed).
///
/// ```
/// use candle_grad_clip::ClippedOptimizer;
/// use candle_grad_clip::optim::Checkpoint;
///
/// fn save_best<O: Checkpoint>(opt: &ClippedOptimizer<O>) -> candle_grad_clip::Result<()> {
///     opt.save("best.optimizer.safetensors")
/// }
/// ```
pub trait Checkpoint: candle_nn::Optimizer + sealed::Sealed {}

macro_rules! checkpoint {
    ($($Optimizer:ty),*) => {
        $(
            impl sealed::Sealed for $Optimizer {}
            impl Checkpoint for $Optimizer {}
        )*
    };
}
// Not a pair in a pair, which is not fused.
checkpoint!(AdamW, Sgd, Pair<AdamW, AdamW>, Pair<AdamW, Sgd>, Pair<Sgd, AdamW>, Pair<Sgd, Sgd>);

/// Like [`fused`], to read: one or two, or none.
pub(crate) fn fused_ref<O: 'static>(optimizer: &O) -> Vec<&dyn Fused> {
    let optimizer: &dyn Any = optimizer;
    let adamw = optimizer.downcast_ref::<AdamW>().map(|o| o as &dyn Fused);
    let one = adamw.or_else(|| optimizer.downcast_ref::<Sgd>().map(|o| o as _));
    one.map_or_else(|| pair::fused_refs(optimizer), |one| vec![one])
}

/// The fused optimizers in this one, if it is one or a [`Pair`] of them.
pub(crate) fn fused<O: 'static>(optimizer: &mut O) -> Option<FusedParts<'_>> {
    let optimizer: &mut dyn Any = optimizer;
    // `is` comes first, as a borrow that one branch returns would last through the others.
    if optimizer.is::<AdamW>() {
        let adamw = optimizer.downcast_mut::<AdamW>();
        return adamw.map(|adamw| FusedParts::one(adamw));
    }
    if optimizer.is::<Sgd>() {
        let sgd = optimizer.downcast_mut::<Sgd>();
        return sgd.map(|sgd| FusedParts::one(sgd));
    }
    pair::fused_parts(optimizer)
}
