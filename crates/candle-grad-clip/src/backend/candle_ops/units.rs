//! Measures by units: a tensor becomes a matrix with one row per unit.

use candle_core::Tensor;
use candle_grad_clip_kernels::{NormType, Stats, Units};

use super::powers::{Found, Job, powers};
use super::tensor_ops::{on_cpu, zeroed};
use crate::backend::cpu;
use crate::error::Result;
use crate::threads::{Work, run};

/// Measures the units of tensors that are not on CPU, with one read per device. Each tensor's
/// results go to its stats.
pub(crate) fn measure_units(
    tensors: Vec<(&Tensor, Units, &mut [Stats])>,
    norm_type: NormType,
) -> Result<()> {
    let mut rest = tensors;
    while let Some(device) = rest.first().map(|(tensor, ..)| tensor.device().clone()) {
        let is_there =
            |(tensor, ..): &(&Tensor, Units, &mut [Stats])| tensor.device().same_device(&device);
        let (of_device, others) = rest.into_iter().partition(is_there);
        measure_on_device(of_device, norm_type)?;
        rest = others;
    }
    Ok(())
}

/// Measures the units of tensors of one device. One read is enough if all elements are finite and
/// of ordinary size.
fn measure_on_device(
    tensors: Vec<(&Tensor, Units, &mut [Stats])>,
    norm_type: NormType,
) -> Result<()> {
    let mut jobs = Vec::with_capacity(tensors.len());
    for &(tensor, units, _) in &tensors {
        jobs.push(Job {
            tensor,
            units,
            bound: None,
        });
    }
    let (found, _) = powers(&jobs, norm_type, &[])?;
    for ((tensor, units, stats), found) in tensors.into_iter().zip(found) {
        if found.iter().any(|unit| matches!(unit, Found::NotFinite)) {
            measure_on_cpu(tensor, units, norm_type, stats)?;
            continue;
        }
        for (unit, stats) in found.into_iter().zip(stats) {
            if let Found::Power(power) = unit {
                *stats = Stats {
                    power,
                    ..Stats::ZERO
                };
            }
        }
    }
    Ok(())
}

/// Measures a tensor with non-finite elements: the CPU kernels count them. The norms are measured
/// on the device, with those elements set to 0.
fn measure_on_cpu(
    tensor: &Tensor,
    units: Units,
    norm_type: NormType,
    stats: &mut [Stats],
) -> Result<()> {
    let here = on_cpu(tensor)?;
    let work = Work::of_elements(here.elem_count());
    run(work, || cpu::measure_units(&here, units, norm_type, stats))?;
    if stats.iter().all(|unit| unit.non_finite() == 0) {
        return Ok(());
    }
    let zeroed = zeroed(&here, tensor.device())?;
    let mut rest = vec![Stats::ZERO; stats.len()];
    measure_on_device(vec![(&zeroed, units, &mut rest[..])], norm_type)?;
    for (stats, rest) in stats.iter_mut().zip(rest) {
        stats.power = rest.power;
    }
    Ok(())
}
