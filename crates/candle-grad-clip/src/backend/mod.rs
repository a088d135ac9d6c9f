//! Where gradients are measured and edited: the only place that looks at a tensor's device.
//!
//! - [`Backend::Cpu`]: kernels over slices, in place, parallel over tensors and inside large ones.
//! - [`Backend::Cuda`]: kernels over all tensors of a GPU, in place, a launch each for measuring, folding and
//!   editing or updating. With the feature `cuda`.
//! - [`Backend::Composed`]: candle's tensor operations only. It serves Metal, and any other
//!   tensor when forced by [`with`], which is how it is tested.

mod composed;
mod composed_step;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod cuda;
mod device;

use std::cell::Cell;

use candle_core::{Device, Tensor};
use candle_grad_clip_kernels::{Edit, GradEdit, NormType, Stats, Units};

use crate::error::Result;
use crate::gradients::{Entry, Place, Request};
use crate::tensors::by_device;
use crate::threads::{Work, run};

pub(crate) use composed::{accumulate as accumulate_composed, round as round_composed};
pub(crate) use composed_step::{Stepped, step as step_composed};
pub(crate) use cpu::{
    accumulate as accumulate_cpu, edit_in_place as edit_cpu, edit_into as edit_cpu_into,
    measure as measure_cpu, measure_units as measure_units_cpu, round as round_cpu,
    step as step_cpu,
};
#[cfg(feature = "cuda")]
pub use cuda::gpu_waits;
pub(crate) use cuda::{
    edit as edit_cuda, measure as measure_cuda, start_steps, update as update_cuda,
};
pub(crate) use device::{Counted, DeviceSteps, Outcome, StepResult, UpdateJob};

/// Which code handles a gradient.
///
/// ```
/// # use candle_core::{Device, Var};
/// # let vars = [Var::new(&[3f32, 4.0], &Device::Cpu)?];
/// # let grads = (vars[0].sqr()?.sum_all()? / 2.0)?.backward()?;
/// use candle_grad_clip::backend::{self, Backend};
/// use candle_grad_clip::{NormType, total_norm};
///
/// let norm = |backend| backend::with(backend, || total_norm(&grads, &vars, NormType::L1));
/// assert_eq!(norm(Backend::Cpu)?, 7.0);
/// assert_eq!(norm(Backend::Composed)?, 7.0);
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// Our kernels, for tensors on CPU.
    Cpu,
    /// Our CUDA kernels, for tensors on NVIDIA GPUs.
    Cuda,
    /// candle's tensor operations, for tensors on any device.
    Composed,
}

thread_local! {
    static FORCED: Cell<Option<Backend>> = const { Cell::new(None) };
}

/// Runs `f` with every gradient handled by `backend`, as far as this thread calls us (not a worker of
/// rayon's pool, which may take up others' work in between): a means to test and to compare. ([`Backend::Cpu`] leaves tensors on other devices to `Composed`, [`Backend::Cuda`] those on CPU to `Cpu` and any others
/// to `Composed`.)
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::backend::{self, Backend};
/// use candle_grad_clip::{NormType, total_norm};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?;
/// let norm = backend::with(Backend::Composed, || total_norm(&grads, &[w], NormType::L2))?;
/// assert!((norm - 5.0).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn with<R>(backend: Backend, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Backend>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(Some(backend)));
    f()
}

/// The choice of backend for each tensor, as it stood on the caller's thread.
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

    pub(crate) fn place(self, grad: &Tensor) -> Place {
        let whole = grad.is_contiguous() && !grad.is_variable();
        match (grad.device(), self.forced) {
            (_, Some(Backend::Composed)) => Place::Elsewhere,
            (Device::Cpu, _) if whole => Place::Cpu,
            (Device::Cpu, _) => Place::CpuCopied,
            (Device::Cuda(_), None | Some(Backend::Cuda)) if whole => Place::Cuda,
            (Device::Cuda(_), None | Some(Backend::Cuda)) => Place::CudaCopied,
            _ => Place::Elsewhere,
        }
    }
}

/// Measures the gradients that only candle's operations handle: one read per device. On the caller's thread, since
/// candle's CUDA devices use a stream per thread.
pub(crate) fn measure_composed(entries: &mut [Entry<'_>], request: Request) -> Result<()> {
    let elsewhere = |entry: &Entry<'_>| entry.place == Place::Elsewhere;
    let grads = entries.iter().map(|e| e.grad.filter(|_| elsewhere(e)));
    for (_, indices) in by_device(grads) {
        let grads: Vec<&Tensor> = indices.iter().filter_map(|&i| entries[i].grad).collect();
        for (index, measured) in indices.into_iter().zip(composed::measure(&grads, request)?) {
            entries[index].measured = measured;
        }
    }
    Ok(())
}

/// Measures the units of tensors that are not on CPU, into the stats beside them: one read per device.
pub(crate) fn measure_units_composed(
    tensors: Vec<(&Tensor, Units, &mut [Stats])>,
    norm_type: NormType,
) -> Result<()> {
    let mut rest = tensors;
    while let Some(device) = rest.first().map(|(tensor, ..)| tensor.device().clone()) {
        let is_there =
            |(tensor, ..): &(&Tensor, Units, &mut [Stats])| tensor.device().same_device(&device);
        let (of_device, others) = rest.into_iter().partition(is_there);
        composed::measure_units(of_device, norm_type)?;
        rest = others;
    }
    Ok(())
}

/// The edit of a whole gradient, for our CUDA kernels: gradients that are edited by units are measured elsewhere, and stay there.
pub(crate) fn whole(edit: GradEdit<'_>) -> Result<Edit> {
    match edit {
        GradEdit::All(edit) => Ok(edit),
        GradEdit::Units(_) => {
            Err(candle_core::Error::msg("the CUDA kernels know no units of a gradient").into())
        }
    }
}

/// The edited `grad` of an entry, as a new tensor. If it is [`Place::Elsewhere`] it has been measured, unless the edit is a plain product.
pub(crate) fn edited(grad: &Tensor, entry: &Entry<'_>, edit: GradEdit<'_>) -> Result<Tensor> {
    let place = entry.place;
    if place == Place::Elsewhere {
        return composed::edit(grad, edit, entry.is_finite());
    }
    let target = grad.zeros_like()?;
    if place.is_cuda() {
        cuda::edit(&[(&grad.contiguous()?, &target, whole(edit)?)])?;
    } else {
        let work = Work::of_elements(grad.elem_count());
        run(work, || cpu::edit_into(grad, &target, edit))?;
    }
    Ok(target)
}
