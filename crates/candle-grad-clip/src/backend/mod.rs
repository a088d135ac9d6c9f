//! Where gradients are measured and edited: the only place that looks at a tensor's device.
//!
//! - [`Backend::Cpu`]: kernels over slices, in place, parallel over tensors and inside large ones.
//! - [`Backend::Composed`]: candle's tensor operations only. It serves CUDA and Metal, and any CPU
//!   tensor when forced by [`with`], which is how it is tested.

mod composed;
mod composed_step;
mod cpu;

use std::cell::Cell;

use candle_core::{Device, Tensor, Var};
use candle_grad_clip_kernels::{BLOCK, GradEdit, NormType, Stats, Units};
use rayon::prelude::*;

use crate::Result;
use crate::measure::{Entry, Request};

pub(crate) use composed::{accumulate as accumulate_composed, round as round_composed};
pub(crate) use composed_step::{Stepped, step as step_composed};
pub(crate) use cpu::{
    accumulate as accumulate_cpu, edit_in_place as edit_cpu, edit_into as edit_cpu_into,
    measure as measure_cpu, measure_units as measure_units_cpu, round as round_cpu,
    step as step_cpu, storage_address,
};

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
    /// candle's tensor operations, for tensors on any device.
    Composed,
}

thread_local! {
    static FORCED: Cell<Option<Backend>> = const { Cell::new(None) };
}

/// Runs `f` with every gradient handled by `backend`, as far as this thread calls us (not a worker of
/// rayon's pool, which may take up others' work in between): a means to test and to compare. ([`Backend::Cpu`] still leaves tensors on other devices to `Composed`.)
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
        if self.forced == Some(Backend::Composed) || !grad.device().is_cpu() {
            Place::Elsewhere
        } else if grad.is_contiguous() && !grad.is_variable() {
            Place::Cpu
        } else {
            Place::CpuCopied
        }
    }
}

/// What can be done to a gradient where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Read and written by our kernels.
    Cpu,
    /// On CPU, but not one after the other, or a Var itself: what changes is a copy.
    CpuCopied,
    /// candle's operations only.
    Elsewhere,
}

/// More Vars than this are worth more than one thread, however small they are.
const MANY_VARS: usize = 512;

/// Whether work is worth more than one thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Small,
    Large,
}

impl Work {
    /// The work of walking over some Vars' gradients.
    pub(crate) fn of(vars: &[Var]) -> Self {
        let many = vars.len() > MANY_VARS;
        if many || vars.iter().map(|var| var.elem_count()).sum::<usize>() > BLOCK {
            Self::Large
        } else {
            Self::Small
        }
    }
}

/// The addresses of the storages of some Vars.
pub(crate) fn storage_addresses(vars: &[Var], work: Work) -> Vec<usize> {
    run(work, |parallel| {
        let address = |var: &Var| storage_address(var);
        if parallel {
            vars.par_iter()
                .with_min_len(MANY_VARS)
                .map(address)
                .collect()
        } else {
            vars.iter().map(address).collect()
        }
    })
}

/// Runs `f(parallel)`: large work inside rayon's pool, so that its parts start and end cheaply;
/// small work right here, since waking a thread costs more than it.
pub(crate) fn run<R: Send>(work: Work, f: impl FnOnce(bool) -> R + Send) -> R {
    match work {
        Work::Small => f(false),
        Work::Large => rayon::scope(|_| f(true)),
    }
}

/// Measures the gradients that are not on CPU: one read per device. On the caller's thread, since
/// candle's CUDA devices use a stream per thread.
pub(crate) fn measure_composed(entries: &mut [Entry<'_>], request: Request) -> Result<()> {
    let mut devices: Vec<(Device, Vec<usize>)> = Vec::new();
    let elsewhere = |(_, entry): &(usize, &Entry<'_>)| entry.place == Place::Elsewhere;
    for (index, entry) in entries.iter().enumerate().filter(elsewhere) {
        let Some(grad) = entry.grad else { continue };
        let device = grad.device();
        match devices
            .iter_mut()
            .find(|(other, _)| other.same_device(device))
        {
            Some((_, indices)) => indices.push(index),
            None => devices.push((device.clone(), vec![index])),
        }
    }
    for (_, indices) in devices {
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

/// The edited `grad`, as a new tensor.
pub(crate) fn edited(grad: &Tensor, place: Place, edit: GradEdit<'_>) -> Result<Tensor> {
    if place == Place::Elsewhere {
        return composed::edit(grad, edit);
    }
    let target = grad.zeros_like()?;
    cpu::edit_into(grad, &target, edit)?;
    Ok(target)
}

/// Reads the headers of some tensors, for their cache misses to overlap: they would not if each were
/// followed by its tensor's work.
pub(crate) fn touch_headers<'a>(tensors: impl Iterator<Item = &'a Tensor>) {
    let sum = |values: &[usize]| values.iter().fold(0usize, |sum, x| sum.wrapping_add(*x));
    let layout = |tensor: &Tensor| sum(tensor.dims()).wrapping_add(sum(tensor.stride()));
    std::hint::black_box(tensors.map(layout).fold(0, usize::wrapping_add));
}
