//! A GPU: its stream, kernel launches and reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Device;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchArgs, LaunchConfig,
};
use candle_grad_clip_kernels::cuda as ptx;

use crate::error::{Error, Result};

/// Threads per block: `THREADS` in the kernels.
pub(super) const THREADS: u32 = 256;

static SYNCS: AtomicU64 = AtomicU64::new(0);

/// The number of times that this crate has waited for a GPU, in this process.
///
/// A step of a fused optimizer with a plain norm or value clip never waits. Reading its
/// [`StepReport`](crate::StepReport) does. Other steps wait once per device.
#[must_use]
pub fn device_sync_count() -> u64 {
    SYNCS.load(Ordering::Relaxed)
}

/// Counts a wait for a GPU, before the wait.
pub(super) fn count_sync() {
    SYNCS.fetch_add(1, Ordering::Relaxed);
}

/// A kernel and its module. candle caches modules by name, so the name includes this crate's
/// version.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    pub(super) name: &'static str,
    module: &'static str,
    ptx: &'static str,
}

impl Kernel {
    const fn measure(name: &'static str) -> Self {
        Self {
            name,
            module: concat!("candle-grad-clip-measure-", env!("CARGO_PKG_VERSION")),
            ptx: ptx::MEASURE,
        }
    }

    const fn update(name: &'static str) -> Self {
        Self {
            name,
            module: concat!("candle-grad-clip-update-", env!("CARGO_PKG_VERSION")),
            ptx: ptx::UPDATE,
        }
    }

    pub(super) const MEASURE_L1: Self = Self::measure("clip_measure_l1");
    pub(super) const MEASURE_L2: Self = Self::measure("clip_measure_l2");
    pub(super) const MEASURE_L1_CLAMPED: Self = Self::measure("clip_measure_l1_clamped");
    pub(super) const MEASURE_L2_CLAMPED: Self = Self::measure("clip_measure_l2_clamped");
    pub(super) const MEASURE_INF: Self = Self::measure("clip_measure_inf");
    pub(super) const MEASURE_P: Self = Self::measure("clip_measure_p");
    pub(super) const FOLD: Self = Self {
        name: "clip_fold",
        module: concat!("candle-grad-clip-fold-", env!("CARGO_PKG_VERSION")),
        ptx: ptx::FOLD,
    };
    pub(super) const EDIT: Self = Self {
        name: "clip_edit",
        module: concat!("candle-grad-clip-edit-", env!("CARGO_PKG_VERSION")),
        ptx: ptx::EDIT,
    };
    pub(super) const ADAMW: Self = Self::update("clip_adamw");
    pub(super) const SGD: Self = Self::update("clip_sgd");
}

/// A device, and its stream.
#[derive(Clone)]
pub(super) struct Gpu {
    device: CudaDevice,
    pub(super) stream: Arc<CudaStream>,
}

impl Gpu {
    pub(super) fn of(device: &Device) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let stream = device.cuda_stream();
        Ok(Self { device, stream })
    }

    /// The kernel, loaded on first use: the driver compiles it for the GPU then, which can fail. So
    /// for a kernel that writes, call this before the first write, and again for the launch.
    pub(super) fn function(&self, kernel: Kernel) -> Result<CudaFunction> {
        let Kernel { name, module, ptx } = kernel;
        let function = self.device.get_or_load_custom_func(name, module, ptx);
        let function = function.map_err(|error| {
            error.context(format!(
                "the CUDA kernel {name} does not load: it needs a GPU of compute capability 7.5 or above, and a driver as new \
                 as the toolkit that it was built with"
            ))
        })?;
        Ok(function.into_cuda_function())
    }

    /// # Safety
    /// The caller must write the memory before reading it.
    pub(super) unsafe fn alloc<T: DeviceRepr>(&self, len: u32) -> Result<CudaSlice<T>> {
        // SAFETY: the caller's. A length of 0 is not allowed by the driver.
        let allocated = unsafe { self.stream.alloc(len.max(1) as usize) };
        allocated.map_err(|error| failed("alloc", error))
    }

    /// Waits for the GPU, and reads `from`.
    pub(super) fn read<T: DeviceRepr>(&self, from: &CudaSlice<T>) -> Result<Vec<T>> {
        count_sync();
        let read = self.stream.clone_dtoh(from);
        let read = read.and_then(|values| self.stream.synchronize().map(|()| values));
        read.map_err(|error| failed("read", error))
    }
}

/// # Safety
/// `launch` has the kernel's arguments, and its pointers are valid for everything that the kernel
/// accesses with `blocks` blocks.
pub(super) unsafe fn launch_blocks(
    kernel: Kernel,
    launch: &mut LaunchArgs<'_>,
    blocks: u32,
) -> Result<()> {
    let config = LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    // SAFETY: the caller's.
    match unsafe { launch.launch(config) } {
        Ok(_) => Ok(()),
        Err(error) => Err(failed(kernel.name, error)),
    }
}

/// An error of the driver, with the operation that failed.
pub(super) fn failed(what: &str, error: DriverError) -> Error {
    candle_core::Error::Cuda(format!("{what}: {error:?}").into()).into()
}
