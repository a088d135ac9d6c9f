//! `ClippedOptimizer` around any optimizer: steps, reports and errors.
#![allow(clippy::unwrap_used)]

mod accumulation;
mod adapters;
mod contract;
mod errors;
mod gradients_of_a_sum;
mod groups;
mod half_precision;
mod inner;
mod loss_scaler;
mod missing_gradients;
mod non_finite;
mod norm_statistics;
mod pair;
mod reports;
mod special_values;
mod steps_taken;
mod unclipped_groups;
mod windows;
