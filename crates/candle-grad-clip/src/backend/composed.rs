//! candle's tensor operations only, and of those only what every device has.
//!
//! Each Var's numbers stay on its device until all are known; then one read brings them to the
//! host, where they are added in f64. No comparison on the device decides whether an element is finite, since each device
//! treats NaN in another way, and Metal by default as if there were none: see [`powers`]. What is not finite is
//! brought to CPU, and measured and edited there. So `clamp`, `minimum` and the maximum only see finite elements.

mod powers;
mod units;

use candle_core::{DType, Device, Tensor};
use candle_grad_clip_kernels::{Edit, GradEdit, Stats, UnitEdit};
use half::{bf16, f16};

pub(super) use units::measure as measure_units;

use self::powers::{Found, Job};

use super::cpu;
use crate::error::Result;
use crate::gradients::{Entry, GradStats, Place, Request};
use crate::tensors::wide_dtype;
use crate::threads::{Work, run};

/// Measures gradients of one device, with one read of it if all is finite and of ordinary size.
pub(super) fn measure(grads: &[&Tensor], request: Request) -> Result<Vec<GradStats>> {
    let (mut jobs, mut counts) = (Vec::new(), Vec::new());
    for grad in grads.iter().filter(|grad| grad.elem_count() > 0) {
        let job = Job::whole(grad);
        jobs.push(job);
        if let Some(bound) = bound(grad, request) {
            counts.push(job.above(bound)?);
            jobs.push(Job {
                bound: Some(bound),
                ..job
            });
        }
    }
    let (found, counts) = powers::powers(&jobs, request.norm_type, &counts)?;
    let (mut found, mut counts) = (found.into_iter().flatten(), counts.into_iter());
    let mut of_grad = |grad: &Tensor| {
        if grad.elem_count() == 0 {
            return Ok(GradStats::ZERO);
        }
        let before = found.next();
        let (after, count) = match bound(grad, request) {
            Some(_) => (found.next(), counts.next()),
            None => (before.filter(|_| request.clip_value.is_some()), None),
        };
        let power = |found: Found| match found {
            Found::Power(power) => Some(power),
            _ => None,
        };
        let stats = |power| Stats {
            power,
            ..Stats::ZERO
        };
        let Some(whole) = before.and_then(power) else {
            return measure_on_cpu(grad, request);
        };
        Ok(GradStats {
            stats: stats(whole),
            clamped: after.and_then(power).map_or(Stats::ZERO, stats),
            num_clipped: count.map_or(0, |count| count.iter().sum::<f64>() as u64),
        })
    };
    grads.iter().map(|grad| of_grad(grad)).collect()
}

/// What a gradient's elements are to be clamped to, if that can change them.
fn bound(grad: &Tensor, request: Request) -> Option<f64> {
    let bound = rounded(request.clip_value?, grad.dtype());
    Some(bound).filter(|bound| bound.is_finite())
}

/// A gradient with elements that are not finite: the kernels on CPU count them. The norm is that of the device with zeros
/// in their place.
fn measure_on_cpu(grad: &Tensor, request: Request) -> Result<GradStats> {
    let here = on_cpu(grad)?;
    let mut entry = Entry {
        grad: Some(&here),
        place: Place::Cpu,
        elements: grad.elem_count(),
        storage: 0,
        measured: GradStats::ZERO,
    };
    run(Work::of_elements(grad.elem_count()), || {
        cpu::measure(&mut entry, request)
    })?;
    let counted = entry.measured;
    if counted.stats.non_finite() == 0 {
        return Ok(counted);
    }
    let zeroed = zeroed(&here, grad.device())?;
    let Some(rest) = measure(&[&zeroed], request)?.pop() else {
        return Ok(counted);
    };
    let mut measured = if request.zero_non_finite {
        rest
    } else {
        counted
    };
    measured.stats = Stats {
        power: rest.stats.power,
        ..counted.stats
    };
    Ok(measured)
}

/// Sets to 0 what is not finite in a tensor on CPU, and brings it to a device.
fn zeroed(here: &Tensor, device: &Device) -> Result<Tensor> {
    let zero = Edit::Scale {
        clip_coef: 1.0,
        zero_non_finite: true,
    };
    run(Work::of_elements(here.elem_count()), || {
        cpu::edit_in_place(here, zero.into())
    })?;
    Ok(here.to_device(device)?)
}

/// A copy on CPU, of which no other thread knows.
fn on_cpu(tensor: &Tensor) -> Result<Tensor> {
    let copy = tensor.detach().force_contiguous()?;
    Ok(copy.to_device(&Device::Cpu)?)
}

/// f64 is kept, everything else is widened to f32 (Metal has no f64).
fn wide(grad: &Tensor) -> Result<Tensor> {
    let dtype = wide_dtype(grad.dtype());
    Ok(grad.detach().to_dtype(dtype)?.contiguous()?)
}

/// A bound as the gradient's dtype has it.
fn rounded(clip_value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::from_f32(clip_value as f32).to_f64(),
        DType::BF16 => bf16::from_f32(clip_value as f32).to_f64(),
        DType::F32 => f64::from(clip_value as f32),
        _ => clip_value,
    }
}

/// The edited gradient, as a new tensor. `is_finite` says whether all its elements are.
pub(super) fn edit(grad: &Tensor, edit: GradEdit<'_>, is_finite: bool) -> Result<Tensor> {
    let edited = edit_wide(grad, edit, is_finite)?;
    Ok(edited.to_dtype(grad.dtype())?.detach())
}

/// `sum` and the edited gradient, in f32, or in f64 for f64: a tensor of its own.
pub(crate) fn accumulate(
    sum: Option<&Tensor>,
    grad: &Tensor,
    edit: Edit,
    is_finite: bool,
) -> Result<Tensor> {
    if grad.elem_count() == 0 {
        return none(grad, wide_dtype(grad.dtype()));
    }
    let grad = edit_wide(grad, edit.into(), is_finite)?;
    Ok(match sum {
        Some(sum) => (sum + grad)?,
        None => grad.force_contiguous()?, // `copy` does not copy on Metal
    })
}

/// `sum * coef` in a dtype.
pub(crate) fn round(sum: &Tensor, coef: f64, dtype: DType) -> Result<Tensor> {
    if sum.elem_count() == 0 {
        return none(sum, dtype);
    }
    Ok(times(sum, coef)?.to_dtype(dtype)?)
}

/// A tensor without elements: candle's operations fail on such ones on CUDA.
fn none(like: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::zeros(like.shape(), dtype, like.device())?)
}

/// The edited gradient in f32, or in f64 for f64, not rounded back. `is_finite` says whether all its elements are.
pub(super) fn edit_wide(grad: &Tensor, edit: GradEdit<'_>, is_finite: bool) -> Result<Tensor> {
    let x = wide(grad)?;
    if !is_finite && tells_apart(edit) {
        let x = on_cpu(&x)?;
        let edited = x.zeros_like()?;
        run(Work::of_elements(x.elem_count()), || {
            cpu::edit_into(&x, &edited, edit)
        })?;
        return Ok(edited.to_device(grad.device())?);
    }
    match edit {
        GradEdit::All(Edit::Scale { clip_coef, .. }) => scaled(x, clip_coef),
        GradEdit::All(Edit::Clamp {
            clip_value,
            clip_coef,
            ..
        }) => scaled(x.clamp(-clip_value, clip_value)?, clip_coef),
        GradEdit::Units(edit) => units::scaled(&x, edit),
    }
}

/// Whether an edit does to a NaN or infinite element what is not plain arithmetic.
fn tells_apart(edit: GradEdit<'_>) -> bool {
    match edit {
        GradEdit::Units(UnitEdit {
            zero_non_finite, ..
        })
        | GradEdit::All(Edit::Scale {
            zero_non_finite, ..
        }) => zero_non_finite,
        GradEdit::All(Edit::Clamp { .. }) => true,
    }
}

/// A coefficient as factors that f32 holds: candle rounds a factor to f32, where a tiny one vanishes.
fn factors(clip_coef: f64) -> [f64; 2] {
    if clip_coef != 0.0 && clip_coef < f64::from(f32::MIN_POSITIVE) {
        [clip_coef.sqrt(); 2]
    } else {
        [clip_coef, 1.0]
    }
}

fn scaled(x: Tensor, clip_coef: f64) -> Result<Tensor> {
    if clip_coef == 1.0 {
        return Ok(x);
    }
    let [a, b] = factors(clip_coef);
    let x = times(&x, a)?;
    if b == 1.0 { Ok(x) } else { times(&x, b) }
}

/// `x * factor`. candle adds 0 to a product, which makes 0 of -0; adding -0 changes nothing.
pub(super) fn times(x: &Tensor, factor: f64) -> Result<Tensor> {
    Ok(x.affine(factor, -0.0)?)
}
