//! The interface of a backend whose GPU decides steps without the host.
//!
//! The results of such a step stay on the GPU until a caller reads them. Only the CUDA backend does
//! this.
#![cfg_attr(not(feature = "cuda"), allow(dead_code))]

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use candle_grad_clip_kernels::Edit;

use crate::error::Result;
use crate::gradients::{GradStats, Plan};
use crate::param_state::{State, StateLayout, StepRule};

/// The update of one Var. `grad` is contiguous and shares no storage with a Var; `state` is
/// initialised.
#[derive(Debug)]
pub(crate) struct UpdateJob<'a> {
    pub(crate) var: &'a Var,
    pub(crate) grad: &'a Tensor,
    pub(crate) state: &'a State,
    pub(crate) layout: StateLayout,
    pub(crate) edit: Edit,
    /// The index of its optimizer equations in `rules`.
    pub(crate) rule: usize,
    pub(crate) is_first: bool,
    /// The index of the Var.
    pub(crate) index: usize,
}

/// The counters that are kept from step to step.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Counted {
    /// The number of steps taken.
    pub(crate) steps: u64,
    pub(crate) skips_in_a_row: u32,
    /// The number of steps taken by each Var.
    pub(crate) counts: Vec<u64>,
}

/// The result of a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outcome {
    pub(crate) total: GradStats,
    pub(crate) clip_coef: f64,
    pub(crate) skipped: bool,
    pub(crate) skips_in_a_row: u32,
    /// The index, among the jobs, of the first with a non-finite gradient.
    pub(crate) first_bad: usize,
}

/// A GPU that decides steps. Its counters are current; the host's are those of the time when it
/// began.
pub(crate) trait DeviceSteps: Send + Sync {
    fn device(&self) -> &Device;
    /// Waits for the GPU, and reads its counters.
    fn counted(&self) -> Result<Counted>;
    /// Launches a step. The jobs' Vars are on this device, and at least one has elements. With
    /// `keeps_norms` the result includes the measurements of each gradient.
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

/// The result of such a step, to be read later.
pub(crate) trait StepResult: Send + Sync {
    /// Whether reading would return without waiting.
    fn is_ready(&self) -> bool;
    /// Reads the outcome, waiting for the GPU if necessary.
    fn read(&self) -> Result<Outcome>;
    /// The measurements of each job's gradient, if they were kept.
    fn read_grads(&self) -> Result<Option<Vec<GradStats>>>;
}
