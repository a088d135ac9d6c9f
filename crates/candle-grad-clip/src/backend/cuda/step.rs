//! A fused optimizer's step that the GPU decides: measure, fold and decide, update, without waiting for any of it.

use std::sync::Arc;

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};

use super::layout::{
    Address, Clock, Decided, DeviceOutcome, DeviceStats, FoldState, Policy, RuleNumbers,
};
use super::measure::{PartsOfChunks, launch_fold, launch_measure};
use super::results::{Pool, Slot};
use super::table::Table;
use super::update::{kernel_of, launch_update, upload_rules};
use super::{Gpu, failed};
use crate::Result;
use crate::backend::device::{Counted, DeviceSteps, Plan, StepResult, UpdateJob};
use crate::optim::StepRule;

/// What lasts from step to step.
struct CudaSteps {
    gpu: Gpu,
    device: Device,
    clock: CudaSlice<Clock>,
    /// Whether each Var has been updated.
    started: CudaSlice<u32>,
    outcome: CudaSlice<DeviceOutcome>,
    parts: Option<PartsOfChunks>,
    pool: Arc<Pool>,
}

/// Hands the lead to the GPU; `counted.started` has one for each Var.
pub(crate) fn start_steps(device: &Device, counted: &Counted) -> Result<Box<dyn DeviceSteps>> {
    let gpu = Gpu::of(device)?;
    let clock = Clock {
        steps: counted.steps,
        skips_in_a_row: counted.skips_in_a_row,
        blocks_done: 0,
    };
    let started: Vec<u32> = counted
        .started
        .iter()
        .map(|&started| started.into())
        .collect();
    let upload = |error| failed("upload", error);
    Ok(Box::new(CudaSteps {
        clock: gpu.stream.clone_htod(&[clock]).map_err(upload)?,
        started: gpu.stream.clone_htod(&started).map_err(upload)?,
        // SAFETY: each step writes it before it is copied.
        outcome: unsafe { gpu.alloc(1)? },
        parts: None,
        pool: Arc::default(),
        device: device.clone(),
        gpu,
    }))
}

impl DeviceSteps for CudaSteps {
    fn device(&self) -> &Device {
        &self.device
    }

    fn counted(&self) -> Result<Counted> {
        let clock = self.gpu.read(&self.clock)?[0];
        let started = self.gpu.read(&self.started)?;
        Ok(Counted {
            steps: clock.steps,
            skips_in_a_row: clock.skips_in_a_row,
            started: started.into_iter().map(|started| started != 0).collect(),
        })
    }

    fn step(
        &mut self,
        jobs: &[UpdateJob<'_>],
        rules: &[StepRule],
        plan: &Plan,
        keeps_norms: bool,
    ) -> Result<Arc<dyn StepResult>> {
        let gpu = &self.gpu;
        let kernel = kernel_of(rules);
        gpu.function(kernel)?; // so that it loads before anything is counted
        let rows = jobs.iter().map(|job| job.row(gpu));
        let table = Table::upload(gpu, rows.collect::<Result<_>>()?)?;
        let numbers = upload_rules(gpu, rules)?;
        let request = plan.request;
        if !self
            .parts
            .as_ref()
            .is_some_and(|parts| parts.fit(table.chunks, request))
        {
            self.parts = None; // freed first
            self.parts = Some(PartsOfChunks::new(gpu, table.chunks, request)?);
        }
        let Some(parts) = &self.parts else {
            unreachable!("just made")
        };
        // SAFETY: the fold writes both before they are read.
        let (tensors, first) = unsafe {
            (
                gpu.alloc::<DeviceStats>(table.count)?,
                gpu.alloc::<u32>(table.count)?,
            )
        };
        let memory = self.pool.take(gpu)?;

        launch_measure(gpu, &table, request, parts)?;
        let policy = policy(plan, &table);
        launch_fold(
            gpu,
            &table,
            policy,
            parts,
            &tensors,
            self.fold_state(&first, &numbers),
        )?;
        let decided = self.decided(&first);
        launch_update(gpu, &table, kernel, &numbers, decided, || jobs.iter())?;
        let tensors = keeps_norms.then_some(tensors);
        let slot = Slot::fill(gpu, &self.pool, memory, &self.outcome, tensors)?;
        Ok(Arc::new(slot))
    }
}

/// What is freed here may be in use still, on the stream of another thread than this.
impl Drop for CudaSteps {
    fn drop(&mut self) {
        let _ = self.gpu.stream.context().synchronize(); // what fails shows elsewhere
    }
}

impl CudaSteps {
    fn fold_state(&self, first: &CudaSlice<u32>, rules: &CudaSlice<RuleNumbers>) -> FoldState {
        let Decided {
            outcome,
            clock,
            started,
            first,
        } = self.decided(first);
        FoldState {
            outcome,
            clock,
            started,
            first,
            rules: self.address(rules),
            num_rules: rules.len() as u32,
        }
    }

    fn decided(&self, first: &CudaSlice<u32>) -> Decided {
        Decided {
            outcome: self.address(&self.outcome),
            clock: self.address(&self.clock),
            started: self.address(&self.started),
            first: self.address(first),
        }
    }

    fn address<T>(&self, slice: &CudaSlice<T>) -> Address {
        slice.device_ptr(&self.gpu.stream).0
    }
}

fn policy(plan: &Plan, table: &Table) -> Policy {
    Policy {
        norm: plan.request.norm_type.into(),
        max_norm: plan.max_norm,
        eps: plan.eps,
        has_clamped: plan.request.clip_value.is_some().into(),
        skip_non_finite: plan.skip_non_finite.into(),
        zero_non_finite: plan.request.zero_non_finite.into(),
        chunk: table.chunk,
    }
}
