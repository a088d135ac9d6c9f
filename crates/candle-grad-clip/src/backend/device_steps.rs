//! Steps that a GPU decides: what the library asks of a backend that can, and what it tells.
//!
//! The numbers of such a step stay on the GPU until somebody asks for them. Only the backend for
//! CUDA does this.
#![cfg_attr(not(feature = "cuda"), allow(dead_code))]

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use candle_grad_clip_kernels::Edit;

use crate::error::Result;
use crate::gradients::{GradStats, Plan};
use crate::param_state::{Kept, State, StepRule};

/// The update of one Var. `grad` is contiguous and shares no storage with a Var; `state` has begun.
#[derive(Debug)]
pub(crate) struct UpdateJob<'a> {
    pub(crate) var: &'a Var,
    pub(crate) grad: &'a Tensor,
    pub(crate) state: &'a State,
    pub(crate) kept: Kept,
    pub(crate) edit: Edit,
    /// The index of its rule.
    pub(crate) rule: usize,
    pub(crate) is_first: bool,
    /// Its index among the Vars.
    pub(crate) index: usize,
}

/// What is counted from step to step.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Counted {
    /// Steps taken.
    pub(crate) steps: u64,
    pub(crate) skips_in_a_row: u32,
    /// The steps that each Var has taken.
    pub(crate) counts: Vec<u64>,
}

/// What a step told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outcome {
    pub(crate) total: GradStats,
    pub(crate) clip_coef: f64,
    pub(crate) skipped: bool,
    pub(crate) skips_in_a_row: u32,
    /// The index, among the jobs, of the first whose gradient is not finite.
    pub(crate) first_bad: usize,
}

/// A GPU that decides steps. It leads: the host's counters are those of the time when it began.
pub(crate) trait DeviceSteps: Send + Sync {
    fn device(&self) -> &Device;
    /// Waits for the GPU, and reads what it has counted.
    fn counted(&self) -> Result<Counted>;
    /// Launches a step. The jobs' Vars are on this device, and at least one has elements. With
    /// `keeps_norms` the result has the measurements of each gradient.
    fn step(
        &mut self,
        jobs: &[UpdateJob<'_>],
        rules: &[StepRule],
        plan: &Plan,
        keeps_norms: bool,
    ) -> Result<Arc<dyn StepResult>>;
}

impl std::fmt::Debug for dyn DeviceSteps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceSteps({:?})", self.device().location())
    }
}

/// The result of one such step.
pub(crate) trait StepResult: Send + Sync {
    /// Whether reading would not wait.
    fn is_ready(&self) -> bool;
    /// Waits for the GPU, if it has not come so far.
    fn read(&self) -> Result<Outcome>;
    /// What each job's gradient measured, if that was kept.
    fn read_grads(&self) -> Result<Option<Vec<GradStats>>>;
}
