//! What is counted from step to step.

use super::skips::Skips;
use super::tiny_coefs::TinyCoefs;

/// Counters of a wrapper. Those of steps that a GPU decides come in when their results are read.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) steps_taken: u64,
    pub(crate) skips: Skips,
    pub(super) tiny_coefs: TinyCoefs,
}
