//! Gradient clipping for [candle](candle_core): the equivalents of PyTorch's `clip_grad_norm_` and
//! `clip_grad_value_` and TensorFlow's `clip_by_global_norm`.
//!
//! ```
//! # use candle_core::{Device, Var};
//! # use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
//! use candle_grad_clip::{Clip, ClippedOptimizer};
//!
//! # fn main() -> candle_core::Result<()> {
//! # let varmap = VarMap::new();
//! # let params = ParamsAdamW::default();
//! let opt = AdamW::new(varmap.all_vars(), params)?;
//! let opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?; // add this line
//! # Ok(())
//! # }
//! ```
//!
//! - [`ClippedOptimizer`] wraps any candle optimizer and returns a [`StepReport`] for each step.
//! - [`Clip`] is the clipping method: by norm, by value, by a limit that adapts during training, or
//!   a chain of these. Implement [`ClipRule`] for your own method.
//! - [`clip_grad_norm`], [`clip_grad_value`], [`clip_by_global_norm`], [`total_norm`] and
//!   [`clip_grads_with_norm`] work on a `GradStore` directly.
//! - [`Checkpoints`] saves and resumes a training run: weights, optimizer, clip and your own state.
//! - [`NormStatistics`] suggests a `max_norm` from the norms of the steps that it has seen.
//! - [`loss::weighted_power`] is a loss whose gradients can grow very large.
//!
//! # Order of a training step
//! 1. Accumulate the gradients of micro-batches ([`GradAccumulator`]).
//! 2. Average the gradients over processes.
//! 3. Divide by the loss scale ([`LossScaler`]).
//! 4. Measure the gradients, and decide whether to skip the step.
//! 5. Clip, and take the optimizer step.
//! 6. Set the learning rate of the next step
//!    ([`set_learning_rate`](candle_nn::Optimizer::set_learning_rate)).
//!
//! A learning rate schedule can be any function of the step:
//!
//! ```
//! # use candle_core::{Device, Var};
//! # use candle_grad_clip::{Clip, ClippedOptimizer};
//! # use candle_nn::{Optimizer, SGD};
//! # fn main() -> candle_core::Result<()> {
//! # let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
//! # let mut opt = ClippedOptimizer::wrap(SGD::new(vec![w.clone()], 0.1)?, vec![w.clone()], Clip::norm(1.0))?;
//! let (peak, warm_up, steps) = (0.1, 10.0, 100.0);
//! for step in 0..100 {
//!     let step = f64::from(step);
//!     let cosine = 0.5 + 0.5 * (std::f64::consts::PI * step / steps).cos();
//!     opt.set_learning_rate(peak * cosine * ((step + 1.0) / warm_up).min(1.0));
//!     opt.backward_step(&w.sqr()?.sum_all()?)?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Terms
//! - `total_norm`: the norm of all gradients, seen as one vector, *before* clipping.
//! - `clipped_norm`: the same norm after clipping.
//! - `clip_coef`: the factor between the two, `min(1, max_norm / (total_norm + eps))`.
//!
//! # Devices
//! On CPU and CUDA (feature `cuda`) this crate's kernels clip gradients in place. On CUDA, a step
//! of a fused optimizer ([`optim`]) with a plain norm or value clip never waits for the GPU;
//! reading its report does. All other steps synchronise with the GPU to read the norm back. On
//! Metal candle's tensor operations clip the gradients, with one read from the device per step.
//!
//! The CUDA code has run on a CPU emulation of the CUDA driver, not yet on a GPU. The Metal path is
//! untested.
//!
//! # Warnings
//! Skipped steps, missing gradients and the like are `tracing` events. They are shown only if the
//! program sets a subscriber, for example `tracing_subscriber::fmt::init()`.
//!
//! # Features
//! - `candle-0_11` (default), `candle-0_10`, `candle-0_9`: the version of candle, exactly one. For
//!   the others, write `default-features = false, features = ["candle-0_10"]`.
//! - `cuda`: this crate's CUDA kernels, and candle 0.11's CUDA backend. `metal`: candle 0.11's Metal
//!   backend. With candle 0.10 and 0.9, turn candle's own feature on as well.
//! - `serde`: `Serialize` and `Deserialize` for plain data.
#![deny(unsafe_code)]

// Other versions under the names that those of candle 0.11 have by themselves.
#[cfg(feature = "candle-0_10")]
extern crate candle_core_0_10 as candle_core;
#[cfg(feature = "candle-0_9")]
extern crate candle_core_0_9 as candle_core;
#[cfg(feature = "candle-0_10")]
extern crate candle_nn_0_10 as candle_nn;
#[cfg(feature = "candle-0_9")]
extern crate candle_nn_0_9 as candle_nn;
#[cfg(any(feature = "candle-0_9", feature = "candle-0_10"))]
extern crate safetensors_0_7 as safetensors;

mod accumulate;
mod as_vars;
pub mod backend;
mod candle_versions;
mod check;
mod checkpoint;
mod clip;
mod error;
mod functions;
mod gradients;
mod groups;
pub mod loss;
mod loss_scaler;
mod norm_statistics;
pub mod optim;
mod optimizer;
mod param_state;
mod pipeline;
mod serde_float;
mod skip_reason;
mod tensors;
mod threads;
mod vars;

pub use accumulate::GradAccumulator;
pub use as_vars::AsVars;
pub use candle_grad_clip_kernels::NormType;
pub use checkpoint::{Checkpoint, Checkpoints};
pub use clip::{
    AdaGc, Agc, AgcUnits, AutoClip, Clip, ClipDecision, ClipRule, GradNorms, GradientStabilizer,
    GroupRecord, NonFinite, QuantileClip, SkipSteps, ZClip, ZClipMode,
};
pub use error::{Error, Result};
pub use functions::{
    ClipGradNorm, clip_by_global_norm, clip_grad_norm, clip_grad_norm_with, clip_grad_value,
    clip_grads_with_norm, total_norm,
};
pub use loss_scaler::LossScaler;
pub use norm_statistics::{MaxNormSuggestion, NormStatistics};
pub use optimizer::{ClippedConfig, ClippedOptimizer, StepPath, StepRecord, StepReport};
pub use skip_reason::SkipReason;
pub use vars::NamedVars;
