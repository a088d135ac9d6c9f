//! Results of steps that the GPU decides, for reading later: the GPU writes each step's result to a
//! separate block of pinned memory.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, HostSlice, PinnedHostSlice, ValidAsZeroBits,
};

use super::gpu::{Gpu, count_sync, failed};
use super::layout::{DeviceOutcome, DeviceStats};
use crate::backend::device_steps::{Outcome, StepResult};
use crate::error::Result;
use crate::gradients::GradStats;

// SAFETY: all fields are numbers that may be 0.
unsafe impl ValidAsZeroBits for DeviceOutcome {}

/// Pinned memory to reuse: freeing it would wait for the GPU.
#[derive(Default)]
pub(super) struct Pool(Mutex<VecDeque<PinnedHostSlice<DeviceOutcome>>>);

/// The result of one step, read on demand.
pub(crate) struct Slot {
    /// `None` only during drop.
    memory: Option<PinnedHostSlice<DeviceOutcome>>,
    gpu: Gpu,
    /// Recorded after the copy into `memory`.
    copied: CudaEvent,
    pool: Arc<Pool>,
    /// The measurements of each gradient, if reports need them.
    tensors: Option<CudaSlice<DeviceStats>>,
}

impl Pool {
    /// Memory for a step's result, taken before the step is launched.
    pub(super) fn take(&self, gpu: &Gpu) -> Result<PinnedHostSlice<DeviceOutcome>> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = free.pop_front() {
            return Ok(memory);
        }
        // SAFETY: a step's outcome is copied into it before it is read.
        let memory = unsafe { gpu.stream.context().alloc_pinned_with_flags(1, 0) };
        memory.map_err(|error| failed("alloc", error))
    }
}

impl Slot {
    /// Enqueues the copy of `outcome` into `memory`.
    pub(super) fn fill(
        gpu: &Gpu,
        pool: &Arc<Pool>,
        mut memory: PinnedHostSlice<DeviceOutcome>,
        outcome: &CudaSlice<DeviceOutcome>,
        tensors: Option<CudaSlice<DeviceStats>>,
    ) -> Result<Self> {
        let copied = gpu.stream.memcpy_dtoh(outcome, &mut memory);
        let copied = copied.and_then(|()| gpu.stream.record_event(None));
        Ok(Self {
            copied: copied.map_err(|error| failed("read", error))?,
            memory: Some(memory),
            gpu: gpu.clone(),
            pool: pool.clone(),
            tensors,
        })
    }

    fn wait(&self) -> Result<()> {
        if self.is_ready() {
            return Ok(());
        }
        count_sync();
        let copied = self.copied.synchronize();
        copied.map_err(|error| failed("read", error))
    }
}

impl StepResult for Slot {
    fn is_ready(&self) -> bool {
        self.copied.is_complete()
    }

    fn read(&self) -> Result<Outcome> {
        self.wait()?;
        let Some(memory) = &self.memory else {
            unreachable!("taken on drop only")
        };
        // SAFETY: the copy into it is done, and the memory is not reused before this slot is
        // dropped. `as_slice` would wait once more.
        let (outcome, _guard) = unsafe { memory.stream_synced_slice(&self.gpu.stream) };
        let outcome = outcome[0];
        Ok(Outcome {
            total: outcome.total.into(),
            clip_coef: outcome.clip_coef,
            skipped: outcome.skipped != 0,
            skips_in_a_row: outcome.skips_in_a_row,
            first_bad: outcome.first_bad as usize,
        })
    }

    fn read_grads(&self) -> Result<Option<Vec<GradStats>>> {
        let Some(tensors) = &self.tensors else {
            return Ok(None);
        };
        // The reading thread may use another stream than the launching thread.
        self.wait()?;
        let read = self.gpu.read(tensors)?;
        Ok(Some(read.into_iter().map(GradStats::from).collect()))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The memory must not be reused or freed before the copy is done. If the wait
        // fails, a later call reports it.
        let _ = self.wait();
        if let Some(memory) = self.memory.take() {
            let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
            free.push_back(memory);
        }
    }
}
