//! A limit as a function of the step.

/// `limit(step)`.
pub(crate) struct Schedule(pub(super) Box<dyn Fn(u64) -> f64 + Send + Sync>);
