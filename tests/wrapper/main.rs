//! `ClippedOptimizer` around any optimizer: what a step does, reports and refuses.
#![allow(clippy::unwrap_used)]

mod accumulation;
mod contract;
mod errors;
mod groups;
mod loss_scaler;
mod missing_gradients;
mod non_finite;
mod reports;
mod summary;
