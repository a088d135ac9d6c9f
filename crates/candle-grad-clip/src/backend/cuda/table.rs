//! The table of tensors for a launch. It is rebuilt for each step, since gradients move, and
//! uploaded.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::{DType, InplaceOp1, Layout, Storage, Tensor};
use candle_grad_clip_kernels::{Edit, MAX_MOMENTS};

use super::gpu::{Gpu, failed};
use super::layout::{Address, Row, ZERO_NON_FINITE};
use crate::error::Result;

/// Elements per chunk; a chunk is the work of one block. Small chunks spread small models over the
/// GPU, and large ones keep the table of results short.
fn chunk_of(elements: u64) -> u32 {
    const MI: u64 = 1024 * 1024;
    if elements <= 16 * MI {
        8 * 1024
    } else if elements <= 256 * MI {
        16 * 1024
    } else {
        64 * 1024
    }
}

/// Bytes per copy: a larger copy from unpinned memory may wait for the GPU.
const UPLOAD: usize = 64 * 1024;

/// Rows on a GPU, and the grid of every launch over them: one block per chunk.
pub(super) struct Table {
    pub(super) rows: CudaSlice<Row>,
    pub(super) count: u32,
    pub(super) chunk: u32,
    pub(super) chunks: u32,
}

impl Table {
    pub(super) fn upload(gpu: &Gpu, mut rows: Vec<Row>) -> Result<Self> {
        let chunk = chunk_of(rows.iter().map(|row| row.elements).sum());
        let mut chunks = 0;
        for row in &mut rows {
            row.first_chunk = chunks;
            chunks += row.elements.div_ceil(chunk.into());
        }
        let too_many = || candle_core::Error::msg("more elements than one launch can have");
        Ok(Self {
            count: u32::try_from(rows.len()).map_err(|_| too_many())?,
            chunk,
            // A grid has at most 2^31 - 1 blocks.
            chunks: i32::try_from(chunks).map_err(|_| too_many())? as u32,
            rows: upload(gpu, &rows)?,
        })
    }
}

fn upload(gpu: &Gpu, rows: &[Row]) -> Result<CudaSlice<Row>> {
    // SAFETY: all of it is written here.
    let mut uploaded = unsafe { gpu.alloc::<Row>(rows.len() as u32)? };
    let at_once = UPLOAD / size_of::<Row>();
    for (index, part) in rows.chunks(at_once).enumerate() {
        let start = index * at_once;
        let mut target = uploaded.slice_mut(start..start + part.len());
        let copied = gpu.stream.memcpy_htod(part, &mut target);
        copied.map_err(|e| failed("upload", e))?;
    }
    Ok(uploaded)
}

impl Row {
    /// A row for a gradient, without an edit.
    pub(super) fn of(gpu: &Gpu, grad: &Tensor) -> Result<Self> {
        Ok(Self {
            first_chunk: 0,
            elements: grad.elem_count() as u64,
            grad: address(gpu, grad)?,
            target: 0,
            moments: [0; MAX_MOMENTS],
            master: 0,
            clip_coef: 1.0,
            clip_value: f64::INFINITY,
            dtype: match grad.dtype() {
                DType::F32 => 0,
                DType::F64 => 1,
                DType::F16 => 2,
                DType::BF16 => 3,
                other => {
                    return Err(
                        candle_core::Error::msg(format!("no CUDA kernel for {other:?}")).into(),
                    );
                }
            },
            rule: 0,
            state: 0,
            flags: 0,
        })
    }

    pub(super) fn edited(mut self, edit: Edit) -> Self {
        let zero = match edit {
            Edit::Scale {
                clip_coef,
                zero_non_finite,
            } => {
                self.clip_coef = clip_coef;
                zero_non_finite
            }
            Edit::Clamp {
                clip_value,
                clip_coef,
                zero_non_finite,
            } => {
                self.clip_coef = clip_coef;
                self.clip_value = clip_value;
                zero_non_finite
            }
        };
        if zero {
            self.flags |= ZERO_NON_FINITE;
        }
        self
    }
}

/// Evaluates `$body` with `$slice` bound to the slice of one of the four dtypes.
macro_rules! with_slice {
    ($storage:expr, $slice:ident => $body:expr) => {
        match $storage {
            CudaStorageSlice::F32($slice) => $body,
            CudaStorageSlice::F64($slice) => $body,
            CudaStorageSlice::F16($slice) => $body,
            CudaStorageSlice::BF16($slice) => $body,
            _ => return Err(candle_core::Error::msg("expected F32, F64, F16 or BF16").into()),
        }
    };
}

/// The address of a contiguous tensor's elements. This stream waits for the work of other streams
/// on the tensor. The caller keeps the tensor until the kernel is launched; after that, stream
/// order protects its memory.
pub(super) fn address(gpu: &Gpu, tensor: &Tensor) -> Result<Address> {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cuda(storage), Some((start, _))) = (&*storage, layout.contiguous_offsets())
    else {
        return Err(
            candle_core::Error::msg("expected a contiguous tensor on a CUDA device").into(),
        );
    };
    let bytes = start * tensor.dtype().size_in_bytes();
    let base = with_slice!(&storage.slice, slice => slice.device_ptr(&gpu.stream).0);
    Ok(base + bytes as u64)
}

/// Declares that a kernel writes to these tensors, for users of several streams. Called before a
/// launch, it waits for the work of other streams; called after, it makes other streams wait.
/// candle's default devices have one stream, so there is nothing to do.
pub(super) fn will_write<'a>(gpu: &Gpu, tensors: impl Iterator<Item = &'a Tensor>) -> Result<()> {
    if gpu.stream.context().is_managing_stream_synchronization() {
        for tensor in tensors.filter(|tensor| tensor.elem_count() > 0) {
            tensor.inplace_op1(&Touch(gpu))?;
        }
    }
    Ok(())
}

/// As [`will_write`], after a launch that read the tensors.
pub(super) fn have_read<'a>(gpu: &Gpu, tensors: impl Iterator<Item = &'a Tensor>) -> Result<()> {
    if gpu.stream.context().is_managing_stream_synchronization() {
        for tensor in tensors {
            address(gpu, tensor)?;
        }
    }
    Ok(())
}

/// Waits for other streams' work on a tensor and records this one's, without changing the tensor.
struct Touch<'a>(&'a Gpu);

impl InplaceOp1 for Touch<'_> {
    fn name(&self) -> &'static str {
        "touch"
    }

    fn cpu_fwd(&self, _: &mut candle_core::CpuStorage, _: &Layout) -> candle_core::Result<()> {
        Err(candle_core::Error::msg(
            "expected a tensor on a CUDA device",
        ))
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> candle_core::Result<()> {
        use candle_core::cuda_backend::cudarc::driver::DevicePtrMut;
        let stream = &self.0.stream;
        with_slice!(&mut storage.slice, slice => drop(slice.device_ptr_mut(stream)));
        Ok(())
    }
}
