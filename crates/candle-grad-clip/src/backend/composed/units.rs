//! Units by candle's operations: a tensor becomes a matrix with a row a unit.

use candle_core::Tensor;
use candle_grad_clip_kernels::{NormType, Stats, UnitEdit, Units};

use super::powers::{Found, Job, powers, wide_tensor};
use super::{factors, on_cpu, zeroed};
use crate::backend::cpu;
use crate::error::Result;
use crate::threads::{Work, run};

/// Measures each unit of some tensors of one device into the stats beside them, with one read of it if all is finite and of
/// ordinary size.
pub(in super::super) fn measure(
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

/// A tensor with elements that are not finite: the kernels on CPU count them. The norms are those of the device with zeros in
/// their place.
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
    measure(vec![(&zeroed, units, &mut rest[..])], norm_type)?;
    for (stats, rest) in stats.iter_mut().zip(rest) {
        stats.power = rest.power;
    }
    Ok(())
}

/// A wide tensor with each unit times its own coefficient.
pub(super) fn scaled(x: &Tensor, edit: UnitEdit<'_>) -> Result<Tensor> {
    let (rows, columns) = match edit.units {
        Units::Rows(length) => (x.elem_count() / length.max(1), length),
        Units::Columns(columns) => (x.elem_count() / columns.max(1), columns),
    };
    let shape = match edit.units {
        Units::Rows(_) => (edit.coefs.len(), 1),
        Units::Columns(_) => (1, edit.coefs.len()),
    };
    let factor = |which: usize| -> Result<Tensor> {
        let values: Vec<f64> = edit.coefs.iter().map(|c| factors(*c)[which]).collect();
        wide_tensor(values, shape, x)
    };
    let mut matrix = x.reshape((rows, columns))?.broadcast_mul(&factor(0)?)?;
    if edit.coefs.iter().any(|coef| factors(*coef)[1] != 1.0) {
        matrix = matrix.broadcast_mul(&factor(1)?)?;
    }
    Ok(matrix.reshape(x.shape())?)
}
