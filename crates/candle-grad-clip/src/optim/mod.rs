//! Fused optimizers: the clip is folded into the update.
//!
//! [`AdamW`] and [`Sgd`] are drop-ins for candle's, alone or in a
//! [`ClippedOptimizer`](crate::ClippedOptimizer), which knows them by type: the coefficient (or the
//! bound, or the zero for what is not finite) then goes into the update. Each gradient is read once
//! for the norm and once for the step, nothing is written to it, and nothing of its size is
//! allocated: 8 words of memory traffic a parameter for clip and AdamW, 4 for clip and SGD. A
//! skipped step touches neither weights nor moments nor the step counter.
//! [`StepReport::path`](crate::StepReport::path) is then
//! [`StepPath::Fused`](crate::StepPath::Fused).
//!
//! # Precision
//! f64 Vars are updated in f64, f32 Vars in f32, f16 and bf16 Vars in f32 with moments in f32: the
//! result is rounded once, to the nearest. Without `master_weights(true)` what an update is smaller
//! than half a unit in the last place of its weight is lost: a bf16 weight has 8 significant bits,
//! so updates below 1/512 of it vanish, step after step. With it, an f32 copy of each
//! half-precision Var takes the updates, and the Var is its rounded value; 4 more bytes a
//! parameter.
//!
//! # In place
//! On CPU Vars are updated in place, so tensors that share their storage see the update, as with
//! `Var::set`. Elsewhere candle's operations make the new values, all of them before the first is
//! put in place.
//!
//! # Checkpoints
//! [`AdamW::save`] and [`Sgd::save`], or [`ClippedOptimizer::save`](crate::ClippedOptimizer::save)
//! with its [`Clip`](crate::Clip) and its counters, write one safetensors file; `load` goes on from
//! there, bit for bit. The **weights are not in it**: candle's
//! [`VarMap::save`](candle_nn::VarMap::save) has them.
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
//! State is found by the Vars' **names**. Those of a `Vec<Var>` are its places (`var.0`, `var.1`,
//! ...), and `VarMap::all_vars` has another order in each process: saving and loading by them is an
//! error. Take `named(&varmap, ..)`, or wrap with `&varmap`;
//! [`NamedVars::by_place`](crate::NamedVars::by_place) says that the order is always the same.
//!
//! `load` restores the hyper-parameters and the `Clip` as they were saved, as PyTorch's
//! `load_state_dict` does: what is to be another one (`set_learning_rate`, `set_params`,
//! `set_clip`) is set after `load`. What is chosen when an optimizer is made (`amsgrad`,
//! `master_weights`) must be as it was. A file that does not fit is refused as a whole, with all
//! that differs in the error; nothing is changed then.
//!
//! `save` writes a second file in the same folder, waits for the disk, and renames: a save that
//! fails (a full disk) or is killed leaves the old file whole. Of several processes that save to
//! one path, in containers or machines of their own, the last wins, whole. What a killed save
//! leaves (`.<name>.<32 hexadecimal digits>.tmp`) is removed by a save to that path a day later. A
//! symbolic link is followed, and a file keeps its mode. A checksum (CRC-32) of each array and of
//! the metadata tells a damaged file; state that is NaN or infinite is not saved, but by
//! `save_non_finite`.
//!
//! # Failure
//! Everything is checked before the first write: hyper-parameters, shapes, dtypes, devices. A step
//! that returns an error has changed nothing. (What no library can promise: a GPU fault that shows
//! later.)

mod adamw;
mod fused;
mod grouped_optimizer;
mod param_states;
mod params;
mod sgd;
mod shared;
mod update;

use std::any::Any;

pub use crate::groups::{ParamGroup, ParamGroups};
pub use adamw::AdamW;
pub(crate) use fused::{Fused, Loaded};
pub use grouped_optimizer::GroupedOptimizer;
pub(crate) use param_states::{ParamStates, Snapshot};
pub use params::ParamsSgd;
pub(crate) use params::Settings;
pub use sgd::Sgd;
pub(crate) use update::Clipped;

mod sealed {
    /// Only optimizers of this crate know how to save what a wrapper adds.
    #[allow(private_bounds)] // that is the seal
    pub trait Sealed: super::Fused {}
}

/// Optimizers that a [`ClippedOptimizer`](crate::ClippedOptimizer) can save and load with its own
/// state: [`AdamW`] and [`Sgd`], and no others (the trait is sealed).
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

impl sealed::Sealed for AdamW {}
impl sealed::Sealed for Sgd {}
impl Checkpoint for AdamW {}
impl Checkpoint for Sgd {}

/// The optimizer as one of ours, whichever constructor made it.
pub(crate) fn fused<O: 'static>(optimizer: &mut O) -> Option<&mut dyn Fused> {
    let optimizer: &mut dyn Any = optimizer;
    // Asked twice, as a borrow that is returned from one branch would last through the other.
    if optimizer.is::<AdamW>() {
        return optimizer.downcast_mut::<AdamW>().map(|o| o as _);
    }
    optimizer.downcast_mut::<Sgd>().map(|o| o as _)
}
