//! The arithmetic of `candle-grad-clip` on plain slices. This crate does not depend on candle.
//!
//! - [`measure`](fn@measure) reads a slice once and returns its [`Stats`]: the power sum of its
//!   finite elements, and the number of non-finite ones.
//! - [`measure_units`] does this for each row or column of a matrix.
//! - [`edit`](fn@edit) scales, clamps or cleans a slice in place; [`edit_into`] writes to another
//!   slice.
//! - [`update`](fn@update) takes an optimizer step, [`AdamW`] or [`Sgd`], and edits the gradient in
//!   the same pass.
//! - [`accumulate`](fn@accumulate) adds a slice to a sum in full precision; [`round_into`] rounds
//!   that sum.
//!
//! Every function returns the same bits for any number of threads and any vector width: slices are
//! cut into fixed blocks, each block is summed in a fixed number of lanes, and the blocks are
//! folded in order. ([`NormType::P`] calls the platform's `pow`, so its bits may differ between
//! machines.)
#![forbid(unsafe_code)]
// A function called inside `simd::dispatch` must be inlined: otherwise it is compiled for the
// baseline CPU.
#![allow(clippy::inline_always)]

mod accumulate;
mod adamw;
mod block;
mod convert;
#[cfg(feature = "cuda")]
pub mod cuda;
mod edit;
mod element;
mod grad_edit;
mod half_conversions;
mod measure;
mod measure_units;
mod norm_type;
mod scaled_power_sum;
mod sgd;
mod simd;
mod unit_edit;
mod units;
mod update;
mod wide;

pub use accumulate::{accumulate, round_into};
pub use adamw::AdamW;
pub use block::BLOCK;
pub use edit::{Edit, coef_factors};
pub use element::Element;
pub use grad_edit::{GradEdit, edit, edit_into};
pub use measure::{ClampStats, Stats, measure, measure_clamped};
pub use measure_units::measure_units;
pub use norm_type::NormType;
pub use scaled_power_sum::{Norm, ScaledPowerSum};
pub use sgd::Sgd;
pub use unit_edit::UnitEdit;
pub use units::Units;
pub use update::{MAX_MOMENTS, Update, UpdateRule, update};
pub use wide::{Wide, WideVec};
