//! Measures gradients.

use candle_core::{DType, Tensor};
use candle_grad_clip_kernels::Stats;
use half::{bf16, f16};

use super::powers::{Found, Job, powers};
use super::tensor_ops::{on_cpu, zeroed};
use crate::backend::cpu;
use crate::error::Result;
use crate::gradients::{Entry, GradStats, Request, Residency};
use crate::tensors::by_device;
use crate::threads::{Work, run};

/// Measures the gradients at [`Residency::Elsewhere`], with one read per device. Runs on the caller's
/// thread, since candle's CUDA devices use a stream per thread.
pub(crate) fn measure(entries: &mut [Entry<'_>], request: Request) -> Result<()> {
    let elsewhere = |entry: &Entry<'_>| entry.residency == Residency::Elsewhere;
    let grads = entries.iter().map(|e| e.grad.filter(|_| elsewhere(e)));
    for (_, indices) in by_device(grads) {
        let grads: Vec<&Tensor> = indices.iter().filter_map(|&i| entries[i].grad).collect();
        for (index, measured) in indices.into_iter().zip(measure_on_device(&grads, request)?) {
            entries[index].measured = measured;
        }
    }
    Ok(())
}

/// Measures gradients of one device. One read is enough if all elements are finite and of ordinary
/// size.
fn measure_on_device(grads: &[&Tensor], request: Request) -> Result<Vec<GradStats>> {
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
    let (found, counts) = powers(&jobs, request.norm_type, &counts)?;
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

/// The bound to clamp a gradient to, if clamping can change an element.
fn bound(grad: &Tensor, request: Request) -> Option<f64> {
    let bound = rounded(request.clip_value?, grad.dtype());
    Some(bound).filter(|bound| bound.is_finite())
}

/// Measures a gradient with non-finite elements: the CPU kernels count them. The norm is measured
/// on the device, with those elements set to 0.
fn measure_on_cpu(grad: &Tensor, request: Request) -> Result<GradStats> {
    let here = on_cpu(grad)?;
    let mut entry = Entry {
        grad: Some(&here),
        residency: Residency::Cpu,
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
    let Some(rest) = measure_on_device(&[&zeroed], request)?.pop() else {
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

/// The bound, rounded to the gradient's dtype.
fn rounded(clip_value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::from_f32(clip_value as f32).to_f64(),
        DType::BF16 => bf16::from_f32(clip_value as f32).to_f64(),
        DType::F32 => f64::from(clip_value as f32),
        _ => clip_value,
    }
}
