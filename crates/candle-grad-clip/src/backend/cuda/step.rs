//! A fused optimizer step that the GPU decides: it measures, decides and updates without the host
//! waiting.

use std::sync::Arc;

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};

use super::gpu::{Gpu, failed};
use super::layout::{
    Address, Decided, DeviceOutcome, DeviceStats, FoldState, Policy, RowStep, RuleNumbers,
    StepCounters,
};
use super::measure::{PartsOfChunks, launch_fold, launch_measure};
use super::results::{Pool, Slot};
use super::table::Table;
use super::update::{kernel_of, launch_update, upload_rules};
use crate::backend::device_steps::{Counted, DeviceSteps, StepResult, UpdateJob};
use crate::error::Result;
use crate::gradients::Plan;
use crate::param_state::StepRule;

/// The data that is kept from step to step.
struct CudaSteps {
    gpu: Gpu,
    device: Device,
    counters: CudaSlice<StepCounters>,
    /// The number of steps taken by each Var.
    counts: CudaSlice<u64>,
    outcome: CudaSlice<DeviceOutcome>,
    parts: Option<PartsOfChunks>,
    pool: Arc<Pool>,
}

/// Moves the counters to the GPU. `counted.counts` has one count per Var.
pub(crate) fn start_steps(device: &Device, counted: &Counted) -> Result<Box<dyn DeviceSteps>> {
    let gpu = Gpu::of(device)?;
    let counters = StepCounters {
        steps: counted.steps,
        skips_in_a_row: counted.skips_in_a_row,
        blocks_done: 0,
    };
    let upload = |error| failed("upload", error);
    Ok(Box::new(CudaSteps {
        counters: gpu.stream.clone_htod(&[counters]).map_err(upload)?,
        counts: gpu.stream.clone_htod(&counted.counts).map_err(upload)?,
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
        let counters = self.gpu.read(&self.counters)?[0];
        Ok(Counted {
            steps: counters.steps,
            skips_in_a_row: counters.skips_in_a_row,
            counts: self.gpu.read(&self.counts)?,
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
        gpu.function(kernel)?; // loads before any counter changes
        let rows = jobs.iter().map(|job| job.row(gpu));
        let table = Table::upload(gpu, rows.collect::<Result<_>>()?)?;
        let numbers = upload_rules(gpu, rules)?;
        let request = plan.request;
        if !self
            .parts
            .as_ref()
            .is_some_and(|parts| parts.has_room_for(table.chunks, request))
        {
            self.parts = None; // free the old one first
            self.parts = Some(PartsOfChunks::new(gpu, table.chunks, request)?);
        }
        let Some(parts) = &self.parts else {
            unreachable!("just made")
        };
        // SAFETY: the fold writes both before they are read.
        let (tensors, row_steps) = unsafe {
            (
                gpu.alloc::<DeviceStats>(table.count)?,
                gpu.alloc::<RowStep>(table.count)?,
            )
        };
        let memory = self.pool.take(gpu)?;

        launch_measure(gpu, &table, request, parts)?;
        launch_fold(
            gpu,
            &table,
            Policy::new(plan, table.chunk),
            parts,
            &tensors,
            self.fold_state(&row_steps, &numbers),
        )?;
        let decided = self.decided(&row_steps);
        launch_update(gpu, &table, kernel, &numbers, decided, || jobs.iter())?;
        let tensors = keeps_norms.then_some(tensors);
        let slot = Slot::fill(gpu, &self.pool, memory, &self.outcome, tensors)?;
        Ok(Arc::new(slot))
    }
}

/// The freed memory may still be in use on the stream of another thread.
impl Drop for CudaSteps {
    fn drop(&mut self) {
        let _ = self.gpu.stream.context().synchronize(); // if this fails, a later call reports it
    }
}

impl CudaSteps {
    fn fold_state(
        &self,
        row_steps: &CudaSlice<RowStep>,
        rules: &CudaSlice<RuleNumbers>,
    ) -> FoldState {
        let Decided {
            outcome,
            counters,
            counts,
            row_steps,
        } = self.decided(row_steps);
        FoldState {
            outcome,
            counters,
            counts,
            row_steps,
            rules: self.address(rules),
        }
    }

    fn decided(&self, row_steps: &CudaSlice<RowStep>) -> Decided {
        Decided {
            outcome: self.address(&self.outcome),
            counters: self.address(&self.counters),
            counts: self.address(&self.counts),
            row_steps: self.address(row_steps),
        }
    }

    fn address<T>(&self, slice: &CudaSlice<T>) -> Address {
        slice.device_ptr(&self.gpu.stream).0
    }
}
