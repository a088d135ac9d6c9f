//! The free functions: results, in-place writes and errors, for any gradients.
#![allow(clippy::unwrap_used)]

mod aliasing;
mod clipping;
mod lists;
mod loss;
mod norms;
mod properties;
mod refusals;
mod robustness;
