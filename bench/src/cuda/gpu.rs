//! The GPU, its clock, and the floor.

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaSlice, CudaStream};

use crate::results::first_line;

/// More than any GPU's cache, several times.
pub(crate) const SCRATCH_BYTES: usize = 512 << 20;
/// How often the scratch memory is written over to keep the GPU busy: 1.5 ms at 3 TB/s.
pub(crate) const BUSY_FILLS: usize = 8;

/// In which state a call finds the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Start {
    /// It has nothing to do: what the host does before its first launch, and between launches,
    /// counts.
    Idle,
    /// It has a millisecond of work left, as after a backward pass: what the host does meanwhile
    /// counts nothing.
    Busy,
}

/// A GPU, with the stream that candle's tensors on it use.
pub(crate) struct Gpu {
    pub(crate) device: Device,
    /// Name, memory, and version of the driver.
    pub(crate) description: String,
    stream: Arc<CudaStream>,
    begin: CudaEvent,
    end: CudaEvent,
    /// What the floor copies, and where to.
    scratch: [CudaSlice<u8>; 2],
}

impl Gpu {
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        let device = Device::new_cuda(ordinal).context("no CUDA device")?;
        let stream = device.as_cuda_device()?.cuda_stream();
        let context = stream.context();
        let description = format!(
            "{}, {:.1} GiB, driver {}",
            context.name()?,
            context.total_mem()? as f64 / f64::from(1 << 30),
            driver(ordinal).unwrap_or_else(|| "unknown".to_owned())
        );
        let event = || context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (begin, end) = (event()?, event()?);
        let scratch = || stream.alloc_zeros::<u8>(SCRATCH_BYTES);
        Ok(Self {
            scratch: [scratch()?, scratch()?],
            device,
            description,
            begin,
            end,
            stream,
        })
    }

    /// Memory that nobody has, once all that is queued is done.
    pub(crate) fn free_bytes(&self) -> Result<usize> {
        self.stream.synchronize()?;
        Ok(self.stream.context().mem_get_info()?.0)
    }

    /// The milliseconds from before `call` to when the GPU has done all that it queued, by the
    /// GPU's clock.
    ///
    /// Before it, other memory is written over, unless the gradients of this set never leave the
    /// cache.
    pub(crate) fn time<R>(
        &mut self,
        start: Start,
        is_cold: bool,
        call: impl FnOnce(&mut Self) -> Result<R>,
    ) -> Result<(f64, R)> {
        let fills = match start {
            Start::Busy => BUSY_FILLS,
            Start::Idle => usize::from(is_cold),
        };
        for _ in 0..fills {
            self.stream.memset_zeros(&mut self.scratch[1])?;
        }
        if start == Start::Idle {
            self.stream.synchronize()?;
        }
        self.begin.record(&self.stream)?;
        let result = call(self)?;
        self.end.record(&self.stream)?;
        let ms = self.begin.elapsed_ms(&self.end)?;
        Ok((f64::from(ms), result))
    }

    /// The floor: moves as many bytes by plain copies, which read half of them and write the other
    /// half.
    pub(crate) fn move_bytes(&mut self, bytes: usize) -> Result<()> {
        let [source, target] = &mut self.scratch;
        let mut left = bytes / 2;
        while left > 0 {
            let len = left.min(SCRATCH_BYTES);
            let mut target = target.slice_mut(..len);
            self.stream.memcpy_dtod(&source.slice(..len), &mut target)?;
            left -= len;
        }
        Ok(())
    }
}

fn driver(ordinal: usize) -> Option<String> {
    let query = [
        &format!("--id={ordinal}"),
        "--query-gpu=driver_version",
        "--format=csv,noheader",
    ];
    first_line("nvidia-smi", &query)
}
