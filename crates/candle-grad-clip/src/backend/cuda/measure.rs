//! Measures all gradients of a device: one launch reads them, a second folds the results to a few
//! numbers per gradient, and the host reads these.

use candle_core::Tensor;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, PushKernelArg};
use candle_grad_clip_kernels::NormType;

use super::gpu::{Gpu, Kernel, THREADS, launch_blocks};
use super::layout::{DeviceRequest, DeviceStats, FoldState, Parts, Policy, Row, Stats};
use super::table::{Table, have_read};
use crate::error::Result;
use crate::gradients::{Entry, GradStats, Plan, Request};
use crate::tensors::by_device;

/// Measures the gradients on CUDA, with one read per device. Returns the total.
pub(crate) fn measure(entries: &mut [Entry<'_>], request: Request) -> Result<GradStats> {
    let mut total = GradStats::ZERO;
    // The host decides, so the fold only adds.
    let plan = Plan {
        request,
        max_norm: f64::INFINITY,
        eps: 0.0,
        skip_non_finite: false,
    };
    let ours = |entry: &Entry<'_>| entry.residency.is_cuda() && entry.elements > 0;
    let grads = entries
        .iter()
        .map(|entry| entry.grad.filter(|_| ours(entry)));
    for (device, indices) in by_device(grads) {
        let gpu = Gpu::of(&device)?;
        let grads = indices.iter().filter_map(|&i| entries[i].grad);
        let grads = grads.map(Tensor::contiguous);
        let grads: Vec<Tensor> = grads.collect::<candle_core::Result<_>>()?;
        let rows = grads.iter().map(|grad| Row::of(&gpu, grad));
        let table = Table::upload(&gpu, rows.collect::<Result<_>>()?)?;
        let parts = PartsOfChunks::new(&gpu, table.chunks, request)?;
        // SAFETY: the fold writes all of it before it is read.
        let tensors = unsafe { gpu.alloc(table.count)? };
        launch_measure(&gpu, &table, request, &parts)?;
        launch_fold(
            &gpu,
            &table,
            Policy::new(&plan, table.chunk),
            &parts,
            &tensors,
            FoldState::default(),
        )?;
        have_read(&gpu, grads.iter())?;
        let measured: Vec<GradStats> = gpu.read(&tensors)?.into_iter().map(Into::into).collect();
        total = total.merge(fold(&measured, request.norm_type), request.norm_type);
        for (index, measured) in indices.into_iter().zip(measured) {
            entries[index].measured = measured;
        }
    }
    Ok(total)
}

/// The total, added in the order of `fold.cu`: host and GPU then decide from the same bits.
fn fold(tensors: &[GradStats], norm_type: NormType) -> GradStats {
    let mut parts = vec![GradStats::ZERO; THREADS as usize];
    for (index, tensor) in tensors.iter().enumerate() {
        let part = &mut parts[index % THREADS as usize];
        *part = part.merge(*tensor, norm_type);
    }
    let mut width = parts.len() / 2;
    while width > 0 {
        for index in 0..width {
            parts[index] = parts[index].merge(parts[index + width], norm_type);
        }
        width /= 2;
    }
    parts[0]
}

/// The measurements of each chunk.
pub(super) struct PartsOfChunks {
    stats: CudaSlice<Stats>,
    /// For clamped measurements.
    clamped: Option<(CudaSlice<Stats>, CudaSlice<u64>)>,
    chunks: u32,
}

impl PartsOfChunks {
    pub(super) fn new(gpu: &Gpu, chunks: u32, request: Request) -> Result<Self> {
        // SAFETY: the measurement writes all of it before the fold reads it.
        let (stats, clamped) = unsafe {
            let clamped = match request.clip_value {
                Some(_) => Some((gpu.alloc(chunks)?, gpu.alloc(chunks)?)),
                None => None,
            };
            (gpu.alloc(chunks)?, clamped)
        };
        Ok(Self {
            stats,
            clamped,
            chunks,
        })
    }

    /// Whether the arrays are large enough.
    pub(super) fn has_room_for(&self, chunks: u32, request: Request) -> bool {
        self.chunks >= chunks && self.clamped.is_some() == request.clip_value.is_some()
    }

    fn addresses(&self, gpu: &Gpu) -> Parts {
        let clamped = self.clamped.as_ref();
        Parts {
            stats: self.stats.device_ptr(&gpu.stream).0,
            clamped: clamped.map_or(0, |(stats, _)| stats.device_ptr(&gpu.stream).0),
            num_clipped: clamped.map_or(0, |(_, counts)| counts.device_ptr(&gpu.stream).0),
        }
    }
}

pub(super) fn launch_measure(
    gpu: &Gpu,
    table: &Table,
    request: Request,
    parts: &PartsOfChunks,
) -> Result<()> {
    if table.chunks == 0 {
        return Ok(());
    }
    let kernel = match (request.norm_type, request.clip_value) {
        (NormType::L1, None) => Kernel::MEASURE_L1,
        (NormType::L2, None) => Kernel::MEASURE_L2,
        (NormType::L1, Some(_)) => Kernel::MEASURE_L1_CLAMPED,
        (NormType::L2, Some(_)) => Kernel::MEASURE_L2_CLAMPED,
        (NormType::Inf, _) => Kernel::MEASURE_INF,
        (NormType::P(_), _) => Kernel::MEASURE_P,
    };
    let function = gpu.function(kernel)?;
    let (request, results) = (
        DeviceRequest::new(request, table.chunk),
        parts.addresses(gpu),
    );
    let mut launch = gpu.stream.launch_builder(&function);
    launch.arg(&table.rows).arg(&table.count);
    launch.arg(&request).arg(&results);
    // SAFETY: the arguments match the kernel's. It reads the rows' gradients, whose tensors the
    // caller holds, and each of the `chunks` blocks writes one element of the results.
    unsafe { launch_blocks(kernel, &mut launch, table.chunks) }
}

pub(super) fn launch_fold(
    gpu: &Gpu,
    table: &Table,
    policy: Policy,
    parts: &PartsOfChunks,
    tensors: &CudaSlice<DeviceStats>,
    state: FoldState,
) -> Result<()> {
    let function = gpu.function(Kernel::FOLD)?;
    let parts = parts.addresses(gpu);
    let mut launch = gpu.stream.launch_builder(&function);
    launch.arg(&table.rows).arg(&table.count);
    launch.arg(&policy).arg(&parts).arg(tensors).arg(&state);
    // SAFETY: the arguments match the kernel's. `tensors` has one element per row. The caller holds
    // the memory that `state` points to.
    unsafe { launch_blocks(Kernel::FOLD, &mut launch, table.count) }
}
