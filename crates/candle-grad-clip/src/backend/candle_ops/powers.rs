//! Power sums from sums and maxima of rows. The host detects non-finite elements in these: a sum
//! propagates NaN and infinity, whereas a device may compile a comparison under the assumption that
//! there are none (Metal's fast math).

use candle_core::{D, DType, Tensor};
use candle_grad_clip_kernels::{NormType, ScaledPowerSum, Units};

use super::tensor_ops::{times, wide, wide_tensor};
use crate::error::Result;
use crate::tensors::wide_dtype;

/// Elements per row. A row is summed on the device, in the device's precision.
const ROW: usize = 1024;
/// A factor that prevents overflow in the sum of a [`ROW`] of finite elements.
const DOWN: f64 = 1.0 / 1_048_576.0;

/// A tensor whose units are to be measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) tensor: &'a Tensor,
    pub(super) units: Units,
    /// Larger elements count as this value.
    pub(super) bound: Option<f64>,
}

/// The intermediate or final result of a unit.
#[derive(Debug, Clone, Copy)]
pub(super) enum Found {
    Nothing,
    /// The largest element, to divide the others by.
    Largest(f64),
    Power(ScaledPowerSum),
    /// A non-finite element was found: the CPU kernels must count them.
    NotFinite,
}

/// The results for the units of a tensor.
pub(super) type OfUnits = Vec<Found>;
/// The numbers that were read for a tensor.
pub(super) type Numbers = Vec<f64>;

impl Found {
    fn is_open(self) -> bool {
        matches!(self, Self::Nothing | Self::Largest(_))
    }
}

impl<'a> Job<'a> {
    /// The whole tensor as one unit.
    pub(super) fn whole(tensor: &'a Tensor) -> Self {
        Self {
            tensor,
            units: Units::Rows(tensor.elem_count()),
            bound: None,
        }
    }

    fn dtype(&self) -> DType {
        wide_dtype(self.tensor.dtype())
    }

    /// The tensor as a matrix with one row per unit; absolute values if there is a bound.
    fn matrix(&self) -> Result<Tensor> {
        let x = wide(self.tensor)?;
        let elements = x.elem_count();
        let x = match self.units {
            Units::Rows(length) => x.reshape((elements / length.max(1), length))?,
            Units::Columns(columns) => {
                let rows = elements / columns.max(1);
                x.reshape((rows, columns))?.t()?.contiguous()?
            }
        };
        Ok(match self.bound {
            Some(bound) => x.abs()?.minimum(bound)?,
            None => x,
        })
    }

    /// Counts the elements larger than `bound`, by rows. Correct if all elements are finite.
    pub(super) fn above(&self, bound: f64) -> Result<Tensor> {
        let above = self.matrix()?.abs()?.gt(bound)?;
        row_sums(&above.to_dtype(self.dtype())?)
    }
}

/// The power sum of each unit of some tensors of one device. For ordinary values this takes one
/// read, which also reads `extra`.
///
/// Squares of f32 can underflow or overflow. If their sum indicates this, a second read gets the
/// largest element, and a third the power sum of the elements divided by it. The division is done
/// as products, since a fast division by a large number can give 0.
pub(super) fn powers(
    jobs: &[Job<'_>],
    norm_type: NormType,
    extra: &[Tensor],
) -> Result<(Vec<OfUnits>, Vec<Numbers>)> {
    let units = |job: &Job<'_>| job.units.count(job.tensor.elem_count());
    let nothing = |job: &Job<'_>| vec![Found::Nothing; units(job)];
    let mut found: Vec<Vec<Found>> = jobs.iter().map(nothing).collect();
    let extra = if matches!(norm_type, NormType::L1 | NormType::L2) {
        let sums = |job: &Job<'_>, _: &[Found]| plain_sums(job, norm_type);
        let tell = |job: &Job<'_>, _, sums: &[f64]| of_plain_sums(job.dtype(), norm_type, sums);
        let extra = ask(jobs, &mut found, extra, sums, tell)?;
        ask(jobs, &mut found, &[], largest, |_, _, numbers| {
            of_largest(norm_type, numbers)
        })?;
        extra
    } else {
        ask(jobs, &mut found, extra, largest, |_, _, numbers| {
            of_largest(norm_type, numbers)
        })?
    };
    let sums = |job: &Job<'_>, found: &[Found]| scaled_sums(job, norm_type, found);
    ask(jobs, &mut found, &[], sums, of_scaled_sums)?;
    Ok((found, extra))
}

/// For each tensor with an open unit, computes `numbers` on the device and reads them all at once.
/// `tell` then updates each open unit. Returns the numbers of `extra`.
fn ask(
    jobs: &[Job<'_>],
    found: &mut [Vec<Found>],
    extra: &[Tensor],
    numbers: impl Fn(&Job<'_>, &[Found]) -> Result<Tensor>,
    tell: impl Fn(&Job<'_>, Found, &[f64]) -> Found,
) -> Result<Vec<Vec<f64>>> {
    let (mut open, mut parts) = (Vec::new(), Vec::new());
    for (job, found) in jobs.iter().zip(found) {
        if found.iter().any(|unit| unit.is_open()) {
            parts.push(numbers(job, found)?);
            open.push((job, found));
        }
    }
    parts.extend_from_slice(extra);
    let mut numbers = read(&parts)?.into_iter();
    for ((job, found), numbers) in open.into_iter().zip(&mut numbers) {
        let each = numbers.len() / found.len().max(1);
        for (unit, numbers) in found.iter_mut().zip(numbers.chunks_exact(each.max(1))) {
            if unit.is_open() {
                *unit = tell(job, *unit, numbers);
            }
        }
    }
    Ok(numbers.collect())
}

fn plain_sums(job: &Job<'_>, norm_type: NormType) -> Result<Tensor> {
    let x = job.matrix()?;
    row_sums(&if norm_type == NormType::L1 {
        x.abs()?
    } else {
        x.sqr()?
    })
}

fn of_plain_sums(dtype: DType, norm_type: NormType, sums: &[f64]) -> Found {
    // Squares that underflow are below 1e-37 (2e-308 in f64). At most 1024 of them per row are
    // negligible against this value.
    let least = match (norm_type, dtype) {
        (NormType::L1, _) => 0.0,
        (_, DType::F64) => 1e-270,
        _ => 1e-27,
    };
    let sum: f64 = sums.iter().sum();
    if sum.is_finite() && sum >= least * sums.len() as f64 {
        Found::Power(ScaledPowerSum { scale: 1.0, sum })
    } else {
        Found::Nothing
    }
}

/// For each unit: the scaled sum of each row, finite if all its elements are, and the largest
/// element of each row.
fn largest(job: &Job<'_>, _: &[Found]) -> Result<Tensor> {
    let abs = job.matrix()?.abs()?;
    let sums = row_sums(&times(&abs, DOWN)?)?;
    let largest = by_rows(&abs, |rows| Ok(rows.max(D::Minus1)?))?;
    Ok(Tensor::cat(&[sums, largest], 1)?)
}

fn of_largest(norm_type: NormType, numbers: &[f64]) -> Found {
    let (sums, largest) = numbers.split_at(numbers.len() / 2);
    let largest = largest.iter().copied().fold(0.0, f64::max);
    if !(largest.is_finite() && sums.iter().all(|sum| sum.is_finite())) {
        return Found::NotFinite;
    }
    match norm_type {
        _ if largest == 0.0 => Found::Power(ScaledPowerSum::ZERO),
        NormType::Inf => Found::Power(ScaledPowerSum {
            scale: largest,
            sum: 1.0,
        }),
        _ => Found::Largest(largest),
    }
}

/// Two factors, each representable in `dtype`, whose product scales `largest` to 1. The product
/// itself may overflow or underflow.
fn inverse(largest: f64, dtype: DType) -> [f64; 2] {
    let half = 2f64.powi(-(largest.log2() / 2.0).floor() as i32);
    let rest = (largest * half).recip();
    match dtype {
        DType::F64 => [half, rest],
        _ => [half, f64::from(rest as f32)],
    }
}

fn scaled_sums(job: &Job<'_>, norm_type: NormType, found: &[Found]) -> Result<Tensor> {
    let mut ratio = job.matrix()?.abs()?;
    for which in [0, 1] {
        let factor = |unit: &Found| match unit {
            Found::Largest(largest) => inverse(*largest, job.dtype())[which],
            _ => 1.0,
        };
        let factors: Vec<f64> = found.iter().map(factor).collect();
        ratio = ratio.broadcast_mul(&wide_tensor(factors, (found.len(), 1), &ratio)?)?;
    }
    row_sums(&match norm_type {
        NormType::L1 | NormType::Inf => ratio,
        NormType::L2 => ratio.sqr()?,
        NormType::P(p) => ratio.powf(p)?,
    })
}

fn of_scaled_sums(job: &Job<'_>, unit: Found, sums: &[f64]) -> Found {
    let Found::Largest(largest) = unit else {
        return unit;
    };
    let [half, rest] = inverse(largest, job.dtype());
    let sum: f64 = sums.iter().sum();
    if sum.is_finite() {
        let scale = half.recip() / rest;
        Found::Power(ScaledPowerSum { scale, sum })
    } else {
        Found::NotFinite
    }
}

/// Sums each row of a matrix in parts of [`ROW`] elements, plus one for the rest.
fn row_sums(x: &Tensor) -> Result<Tensor> {
    by_rows(x, |rows| Ok(rows.sum(D::Minus1)?))
}

/// Applies `reduce` to each row of a matrix in parts of [`ROW`] elements, and to the rest.
fn by_rows(x: &Tensor, reduce: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (units, length) = x.dims2()?;
    let parts = length / ROW;
    let mut reduced = Vec::with_capacity(2);
    if parts > 0 {
        let rows = x.narrow(1, 0, parts * ROW)?.reshape((units, parts, ROW))?;
        reduced.push(reduce(&rows)?);
    }
    if parts * ROW < length {
        let rest = x.narrow(1, parts * ROW, length - parts * ROW)?;
        reduced.push(reduce(&rest.contiguous()?)?.reshape((units, 1))?);
    }
    Ok(Tensor::cat(&reduced, 1)?)
}

/// Reads the numbers of all tensors in one transfer.
fn read(parts: &[Tensor]) -> Result<Vec<Vec<f64>>> {
    if parts.is_empty() {
        return Ok(Vec::new());
    }
    let has_f64 = parts.iter().any(|part| part.dtype() == DType::F64);
    let dtype = if has_f64 { DType::F64 } else { DType::F32 };
    let flat = |part: &Tensor| part.flatten_all()?.to_dtype(dtype);
    let flat: Vec<Tensor> = parts.iter().map(flat).collect::<candle_core::Result<_>>()?;
    let all = Tensor::cat(&flat, 0)?;
    let mut numbers = if has_f64 {
        all.to_vec1::<f64>()?
    } else {
        all.to_vec1::<f32>()?.into_iter().map(f64::from).collect()
    }
    .into_iter();
    let of_part = |part: &Tensor| numbers.by_ref().take(part.elem_count()).collect();
    Ok(parts.iter().map(of_part).collect())
}
