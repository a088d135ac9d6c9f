//! The arithmetic of `candle-grad-clip` on plain slices. This crate knows no tensors.
//!
//! - [`measure`](fn@measure) reads a slice once and returns its [`Stats`]: the power sum of its
//!   finite elements, and how many were not finite.
//! - [`measure_units`] does so for each row or column of a matrix.
//! - [`edit`](fn@edit) scales, clamps or cleans a slice in place; [`edit_into`] writes the result
//!   elsewhere.
//! - [`update`](fn@update) takes an optimizer's step, [`AdamW`] or [`Sgd`], with the gradient edited on the way.
//! - [`accumulate`](fn@accumulate) adds a slice to a sum in full precision, [`round_into`] rounds that sum.
//!
//! Every function gives the same bits for any number of threads and any width of vector unit:
//! slices are cut into fixed blocks, each block is summed in a fixed number of lanes, and blocks
//! are folded in order. (A [`NormType::P`] calls the platform's `pow`, so there the bits may
//! differ between machines.)
#![forbid(unsafe_code)]
// What runs inside `simd::dispatch` must be inlined there, or it is compiled for the baseline CPU.
#![allow(clippy::inline_always)]

mod accumulate;
mod adamw;
#[cfg(feature = "cuda")]
pub mod cuda;
mod edit;
mod element;
mod measure;
mod norm_type;
mod partial_power;
mod sgd;
mod simd;
mod units;
mod update;
mod wide;

pub use accumulate::{accumulate, round_into};
pub use adamw::AdamW;
pub use edit::{Edit, edit, edit_into};
pub use element::Element;
pub use measure::{ClampStats, Stats, measure, measure_clamped};
pub use norm_type::NormType;
pub use partial_power::{Norm, PartialPower};
pub use sgd::Sgd;
pub use units::{GradEdit, UnitEdit, Units, measure_units};
pub use update::{MOMENTS, Rule, Update, update};
pub use wide::{Wide, WideVec};

/// Elements that one task handles: slices up to this long are handled by the calling thread alone.
///
/// 64 Ki f32 values are 256 KiB: enough work for what starting a task costs not to count, and small
/// enough to spread a matrix evenly over threads.
///
/// ```
/// use candle_grad_clip_kernels::{BLOCK, NormType, measure};
///
/// let ones = vec![1f32; BLOCK + 1]; // two tasks
/// assert_eq!(measure(&ones, NormType::L1).power.sum, (BLOCK + 1) as f64);
/// ```
pub const BLOCK: usize = 64 * 1024;
