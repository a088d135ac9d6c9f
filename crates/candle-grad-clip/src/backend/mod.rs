//! The backends that measure and edit gradients, and the choice between them by device.
//!
//! - [`Backend::Cpu`]: kernels over slices, in place, parallel over tensors and inside large ones.
//! - [`Backend::Cuda`]: kernels over all tensors of a GPU, in place, with one launch each for
//!   measuring, folding, and editing or updating. With the feature `cuda`.
//! - [`Backend::CandleOps`]: candle's tensor operations only, for Metal. [`with_backend`] can force
//!   it for any tensor, as the tests do.

pub(crate) mod candle_ops;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
pub(crate) mod cuda;
mod device_steps;

use std::cell::Cell;

use candle_core::{Device, Tensor};
use candle_grad_clip_kernels::{Edit, GradEdit};

use crate::error::Result;
use crate::gradients::{Entry, Residency};
use crate::threads::{Work, run};

pub(crate) use candle_ops::Stepped;
#[cfg(feature = "cuda")]
pub use cuda::device_sync_count;
pub(crate) use device_steps::{Counted, DeviceSteps, Outcome, StepResult, UpdateJob};

/// Which code handles a gradient.
///
/// ```
/// # use candle_core::{Device, Var};
/// # let vars = [Var::new(&[3f32, 4.0], &Device::Cpu)?];
/// # let grads = (vars[0].sqr()?.sum_all()? / 2.0)?.backward()?;
/// use candle_grad_clip::backend::{self, Backend};
/// use candle_grad_clip::{NormType, total_norm};
///
/// let norm = |backend| backend::with_backend(backend, || total_norm(&grads, &vars, NormType::L1));
/// assert_eq!(norm(Backend::Cpu)?, 7.0);
/// assert_eq!(norm(Backend::CandleOps)?, 7.0);
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// This crate's CPU kernels, for tensors on CPU.
    Cpu,
    /// This crate's CUDA kernels, for tensors on NVIDIA GPUs.
    Cuda,
    /// candle's tensor operations, for tensors on any device.
    CandleOps,
}

thread_local! {
    static FORCED: Cell<Option<Backend>> = const { Cell::new(None) };
}

/// Runs `f` with a forced backend, for tests and comparisons.
///
/// It applies to calls from this thread. Do not use it on a worker of rayon's pool, which may steal
/// other work meanwhile. [`Backend::Cpu`] handles only tensors on CPU; `CandleOps` handles the
/// others. [`Backend::Cuda`] handles only tensors on CUDA; `Cpu` handles those on CPU, and
/// `CandleOps` the others.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::backend::{self, Backend};
/// use candle_grad_clip::{NormType, total_norm};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?;
/// let norm = backend::with_backend(Backend::CandleOps, || total_norm(&grads, &[w], NormType::L2))?;
/// assert!((norm - 5.0).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn with_backend<R>(backend: Backend, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Backend>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(Some(backend)));
    f()
}

/// The choice of backend for each tensor, captured on the caller's thread.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backends {
    forced: Option<Backend>,
}

impl Backends {
    pub(crate) fn current() -> Self {
        Self {
            forced: FORCED.get(),
        }
    }

    pub(crate) fn residency(self, grad: &Tensor) -> Residency {
        let whole = grad.is_contiguous() && !grad.is_variable();
        match (grad.device(), self.forced) {
            (_, Some(Backend::CandleOps)) => Residency::Elsewhere,
            (Device::Cpu, _) if whole => Residency::Cpu,
            (Device::Cpu, _) => Residency::CpuCopied,
            (Device::Cuda(_), None | Some(Backend::Cuda)) if whole => Residency::Cuda,
            (Device::Cuda(_), None | Some(Backend::Cuda)) => Residency::CudaCopied,
            _ => Residency::Elsewhere,
        }
    }
}

/// The edit of a whole gradient. The CUDA kernels can't edit by units: `candle_ops` measures and
/// edits those gradients.
pub(crate) fn expect_uniform_edit(edit: GradEdit<'_>) -> Result<Edit> {
    match edit {
        GradEdit::All(edit) => Ok(edit),
        GradEdit::Units(_) => {
            Err(candle_core::Error::msg("the CUDA kernels know no units of a gradient").into())
        }
    }
}

/// Returns the edited `grad` as a new tensor. A gradient at [`Residency::Elsewhere`] must have been
/// measured, unless the edit is a plain product.
pub(crate) fn edit_to_new(grad: &Tensor, entry: &Entry<'_>, edit: GradEdit<'_>) -> Result<Tensor> {
    let residency = entry.residency;
    if residency == Residency::Elsewhere {
        return candle_ops::edit(grad, edit, entry.is_finite());
    }
    let target = grad.zeros_like()?;
    if residency.is_cuda() {
        cuda::edit(&[(&grad.contiguous()?, &target, expect_uniform_edit(edit)?)])?;
    } else {
        let work = Work::of_elements(grad.elem_count());
        run(work, || cpu::edit_into(grad, &target, edit))?;
    }
    Ok(target)
}
