//! The free functions: what they return, write and refuse, for any gradients.
#![allow(clippy::unwrap_used)]

mod aliasing;
mod clipping;
mod loss;
mod norms;
mod properties;
mod refusals;
mod robustness;
