//! Units by candle's operations: a tensor becomes a matrix with a row a unit.

use candle_core::{D, DType, Tensor};
use candle_grad_clip_kernels::{NormType, PartialPower, Stats, UnitEdit, Units};

use super::{ROW, factors, is_finite, is_nan, powers, read, wide};
use crate::Result;

/// Measures each unit of some tensors of one device into the stats beside them, with one read of it.
pub(in super::super) fn measure(
    tensors: Vec<(&Tensor, Units, &mut [Stats])>,
    norm_type: NormType,
) -> Result<()> {
    let mut parts = Vec::new();
    for (tensor, units, _) in &tensors {
        parts.extend(numbers(tensor, *units, norm_type)?);
    }
    let mut numbers = read(&parts)?.into_iter();
    for (tensor, _, stats) in tensors {
        let elements = tensor.elem_count() / stats.len().max(1);
        assemble(elements, norm_type, stats, &mut numbers);
    }
    Ok(())
}

/// All that [`assemble`] takes for one tensor, in its order.
fn numbers(tensor: &Tensor, units: Units, norm_type: NormType) -> Result<Vec<Tensor>> {
    let x = matrix(&wide(tensor)?, units)?;
    let (abs, zero) = (x.abs()?, x.zeros_like()?);
    let (finite, nan) = (is_finite(&x)?, is_nan(&x)?);
    let abs = finite.where_cond(&abs, &zero)?;
    let [largest, powered] = powers(&abs, 1, norm_type)?;
    Ok(vec![
        sums(&finite.to_dtype(x.dtype())?)?,
        sums(&nan.to_dtype(x.dtype())?)?,
        largest.flatten_all()?,
        sums(&powered)?,
    ])
}

/// A row a unit.
fn matrix(x: &Tensor, units: Units) -> Result<Tensor> {
    let elements = x.elem_count();
    Ok(match units {
        Units::Rows(length) => x.reshape((elements / length.max(1), length))?,
        Units::Columns(columns) => {
            let rows = elements / columns.max(1);
            x.reshape((rows, columns))?.t()?.contiguous()?
        }
    })
}

/// Of each row, the sums of [`ROW`] elements each: behind each other.
fn sums(x: &Tensor) -> Result<Tensor> {
    let (rows, length) = x.dims2()?;
    let parts = length.div_ceil(ROW);
    if parts <= 1 {
        return Ok(x.sum(D::Minus1)?);
    }
    let padded = x.pad_with_zeros(1, 0, parts * ROW - length)?;
    let sums = padded.reshape((rows, parts, ROW))?.sum(D::Minus1)?;
    Ok(sums.flatten_all()?)
}

/// The stats of units of so many elements, from the [`numbers`] of their tensor.
fn assemble(
    elements: usize,
    norm_type: NormType,
    stats: &mut [Stats],
    numbers: &mut impl Iterator<Item = f64>,
) {
    let parts = elements.div_ceil(ROW).max(1);
    let units = stats.len();
    let mut sums = |parts: usize| -> Vec<f64> {
        let mut sum = |_| numbers.by_ref().take(parts).sum::<f64>();
        (0..units).map(&mut sum).collect()
    };
    let (finite, nan) = (sums(parts), sums(parts));
    let (largest, powered) = (sums(1), sums(parts));
    for (unit, stats) in stats.iter_mut().enumerate() {
        let (finite, nan) = (finite[unit] as u64, nan[unit] as u64);
        let (scale, sum) = (largest[unit], powered[unit]);
        let power = match norm_type {
            _ if scale == 0.0 => PartialPower::ZERO,
            NormType::Inf => PartialPower { scale, sum: 1.0 },
            _ => PartialPower { scale, sum },
        };
        *stats = Stats {
            power,
            nan,
            infinite: elements as u64 - finite - nan,
        };
    }
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
        // Metal has no f64.
        Ok(if x.dtype() == DType::F64 {
            Tensor::from_vec(values, shape, x.device())?
        } else {
            let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
            Tensor::from_vec(values, shape, x.device())?
        })
    };
    let mut matrix = x.reshape((rows, columns))?.broadcast_mul(&factor(0)?)?;
    if edit.coefs.iter().any(|coef| factors(*coef)[1] != 1.0) {
        matrix = matrix.broadcast_mul(&factor(1)?)?;
    }
    Ok(matrix.reshape(x.shape())?)
}
