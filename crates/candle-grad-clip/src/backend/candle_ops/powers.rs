//! Power sums by sums and maxima of rows. What is not finite is found on the host: sums carry NaN
//! and infinity by themselves, whereas a comparison on a device may be compiled as if there were
//! none (Metal's fast math).

use candle_core::{D, DType, Tensor};
use candle_grad_clip_kernels::{NormType, ScaledPowerSum, Units};

use super::tensor_ops::{times, wide, wide_tensor};
use crate::error::Result;
use crate::tensors::wide_dtype;

/// Elements that are added on the device, in its own precision.
const ROW: usize = 1024;
/// A factor by which no sum of a [`ROW`] of finite elements overflows.
const DOWN: f64 = 1.0 / 1_048_576.0;

/// A tensor of which each unit's power is asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) tensor: &'a Tensor,
    pub(super) units: Units,
    /// Larger elements count as this.
    pub(super) bound: Option<f64>,
}

/// What is known of a unit.
#[derive(Debug, Clone, Copy)]
pub(super) enum Found {
    Nothing,
    /// The largest element, which is what the others are to be divided by.
    Largest(f64),
    Power(ScaledPowerSum),
    /// An element is not finite: a case for the kernels on CPU, which count such ones.
    NotFinite,
}

/// What is known of the units of a tensor.
pub(super) type OfUnits = Vec<Found>;
/// What was read of a tensor.
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

    /// A row a unit. With a bound, absolute values.
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

    /// Sums of how many elements are larger than `bound`: right if all are finite.
    pub(super) fn above(&self, bound: f64) -> Result<Tensor> {
        let above = self.matrix()?.abs()?.gt(bound)?;
        row_sums(&above.to_dtype(self.dtype())?)
    }
}

/// The power of each unit of some tensors of one device. Of ordinary values that is one read of it;
/// `extra` is read on the way.
///
/// Squares of f32 can vanish or overflow. Where their sum shows that they may have, the largest
/// element is asked for, and then the sum of the elements divided by that. (As products: a fast
/// division by a large number can give 0.)
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

/// Reads the same count of numbers for each unit of the tensors with an open one, and lets `tell`
/// say what they show. Returns the numbers of `extra`.
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
    // Squares that vanish are below 1e-37 (2e-308 in f64), so those of a row below a millionth of
    // an ulp of this.
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

/// Of each unit, the scaled sums of its rows, which are finite if all elements are, and the largest
/// of each row.
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

/// Two factors, each of which the dtype holds, that bring a number to 1: their product may be too
/// large or too small.
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

/// Of each row of a matrix, the sums of [`ROW`] elements each, and one of the rest.
fn row_sums(x: &Tensor) -> Result<Tensor> {
    by_rows(x, |rows| Ok(rows.sum(D::Minus1)?))
}

/// Of each row of a matrix, what `reduce` makes of [`ROW`] elements each, and of the rest.
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

/// The one read: the numbers of each tensor.
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
