//! candle's tensor operations only, and of those only what every device has.
//!
//! Each Var's numbers stay on its device until all are known; then one read brings them to the
//! host, where they are added in f64. Two of candle's own operations are avoided, as they treat NaN
//! in another way on each device: `clamp` (NaN becomes the bound on CUDA and Metal) and the maximum
//! (loses a NaN on CPU). Here both only see what is not NaN.

mod units;

use candle_core::{D, DType, Tensor};
use candle_grad_clip_kernels::{Edit, GradEdit, NormType, PartialPower, Stats, UnitEdit};
use half::{bf16, f16};

pub(super) use units::measure as measure_units;

use crate::Result;
use crate::measure::{GradStats, Request};
use crate::optim::state::wide_dtype;

/// Elements that are added on the device, in its own precision.
const ROW: usize = 1024;

/// Measures gradients of one device, with one read of it.
pub(super) fn measure(grads: &[&Tensor], request: Request) -> Result<Vec<GradStats>> {
    let mut parts = Vec::new();
    for grad in grads {
        if grad.elem_count() > 0 {
            parts.extend(numbers(grad, request)?);
        }
    }
    let mut numbers = read(&parts)?.into_iter();
    let mut take = |n| numbers.by_ref().take(n).collect::<Vec<f64>>();
    Ok(grads
        .iter()
        .map(|grad| match grad.elem_count() {
            0 => GradStats::ZERO,
            _ => assemble(grad, request, &mut take),
        })
        .collect())
}

/// f64 is kept, everything else is widened to f32 (Metal has no f64).
fn wide(grad: &Tensor) -> Result<Tensor> {
    let dtype = wide_dtype(grad.dtype());
    Ok(grad.detach().to_dtype(dtype)?.contiguous()?)
}

/// 1 where an element is NaN.
fn is_nan(x: &Tensor) -> Result<Tensor> {
    Ok(x.ne(x)?)
}

/// 1 where an element is finite.
fn is_finite(x: &Tensor) -> Result<Tensor> {
    let largest = if x.dtype() == DType::F64 {
        f64::MAX
    } else {
        f32::MAX.into()
    };
    Ok(x.abs()?.le(largest)?)
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

/// All that [`assemble`] takes for one gradient, in its order.
fn numbers(grad: &Tensor, request: Request) -> Result<Vec<Tensor>> {
    let x = wide(grad)?.flatten_all()?;
    let (abs, zero) = (x.abs()?, x.zeros_like()?);
    let (finite, nan) = (is_finite(&x)?, is_nan(&x)?);
    let mut parts = Vec::new();
    parts.push(row_sums(&finite.to_dtype(x.dtype())?)?);
    parts.push(row_sums(&nan.to_dtype(x.dtype())?)?);
    parts.extend(power(&finite.where_cond(&abs, &zero)?, request.norm_type)?);
    if let Some(clip_value) = request.clip_value {
        let bound = rounded(clip_value, grad.dtype());
        let only_finite = request.zero_non_finite || bound.is_infinite();
        let kept = if only_finite { finite } else { x.eq(&x)? };
        let kept = kept.where_cond(&abs, &zero)?;
        parts.extend(power(&kept.minimum(bound)?, request.norm_type)?);
        parts.push(row_sums(&kept.gt(bound)?.to_dtype(x.dtype())?)?);
    }
    Ok(parts)
}

/// The largest of `abs`, and the power sums of its rows divided by that.
fn power(abs: &Tensor, norm_type: NormType) -> Result<[Tensor; 2]> {
    let [largest, powered] = powers(abs, 0, norm_type)?;
    Ok([largest, row_sums(&powered)?])
}

/// The largest of `abs` along a dimension, and its elements divided by that, to the norm's power.
fn powers(abs: &Tensor, dim: usize, norm_type: NormType) -> Result<[Tensor; 2]> {
    let largest = abs.max_keepdim(dim)?;
    // Where all are zero, divide by 1.
    let scale = (&largest + largest.eq(0f64)?.to_dtype(abs.dtype())?)?;
    let ratio = abs.broadcast_div(&scale)?;
    let powered = match norm_type {
        NormType::L1 | NormType::Inf => ratio,
        NormType::L2 => ratio.sqr()?,
        NormType::P(p) => ratio.powf(p)?,
    };
    Ok([largest, powered])
}

/// Sums of [`ROW`] elements each, and one of the rest.
fn row_sums(x: &Tensor) -> Result<Tensor> {
    let elements = x.elem_count();
    let whole = elements / ROW * ROW;
    if whole == 0 {
        return Ok(x.sum_keepdim(0)?);
    }
    let rows = x
        .narrow(0, 0, whole)?
        .reshape((whole / ROW, ROW))?
        .sum(D::Minus1)?;
    if whole == elements {
        return Ok(rows);
    }
    let rest = x.narrow(0, whole, elements - whole)?.sum_keepdim(0)?;
    Ok(Tensor::cat(&[rows, rest], 0)?)
}

/// The one read: all numbers behind each other.
fn read(parts: &[Tensor]) -> Result<Vec<f64>> {
    if parts.is_empty() {
        return Ok(Vec::new());
    }
    let has_f64 = parts.iter().any(|part| part.dtype() == DType::F64);
    let dtype = if has_f64 { DType::F64 } else { DType::F32 };
    let parts = parts
        .iter()
        .map(|part| part.to_dtype(dtype))
        .collect::<candle_core::Result<Vec<_>>>()?;
    let all = Tensor::cat(&parts, 0)?;
    Ok(if has_f64 {
        all.to_vec1::<f64>()?
    } else {
        all.to_vec1::<f32>()?.into_iter().map(f64::from).collect()
    })
}

/// The stats of one gradient, from its [`numbers`].
fn assemble(
    grad: &Tensor,
    request: Request,
    take: &mut impl FnMut(usize) -> Vec<f64>,
) -> GradStats {
    let elements = grad.elem_count();
    let rows = elements.div_ceil(ROW);
    let mut count = |n| take(n).iter().sum::<f64>() as u64;
    let finite = count(rows);
    let nan = count(rows);
    let mut power = || {
        let largest = take(1).first().copied().unwrap_or(0.0);
        let sum: f64 = take(rows).iter().sum();
        match request.norm_type {
            _ if largest == 0.0 => PartialPower::ZERO,
            NormType::Inf => PartialPower {
                scale: largest,
                sum: 1.0,
            },
            _ => PartialPower {
                scale: largest,
                sum,
            },
        }
    };
    let infinite = elements as u64 - finite - nan;
    let mut measured = GradStats {
        stats: Stats {
            power: power(),
            nan,
            infinite,
        },
        ..GradStats::ZERO
    };
    if let Some(clip_value) = request.clip_value {
        measured.clamped.power = power();
        measured.num_clipped = take(rows).iter().sum::<f64>() as u64;
        if !request.zero_non_finite {
            let unbounded = rounded(clip_value, grad.dtype()).is_infinite();
            measured.clamped.infinite = if unbounded { infinite } else { 0 };
            measured.clamped.nan = nan;
        }
    }
    measured
}

/// The edited gradient, as a new tensor.
pub(super) fn edit(grad: &Tensor, edit: GradEdit<'_>) -> Result<Tensor> {
    Ok(edit_wide(grad, edit)?.to_dtype(grad.dtype())?.detach())
}

/// `sum` and the edited gradient, in f32, or in f64 for f64: a tensor of its own.
pub(crate) fn accumulate(sum: Option<&Tensor>, grad: &Tensor, edit: Edit) -> Result<Tensor> {
    if grad.elem_count() == 0 {
        return none(grad, wide_dtype(grad.dtype()));
    }
    let grad = edit_wide(grad, edit.into())?;
    Ok(match sum {
        Some(sum) => (sum + grad)?,
        None => grad.copy()?,
    })
}

/// `sum * coef` in a dtype.
pub(crate) fn round(sum: &Tensor, coef: f64, dtype: DType) -> Result<Tensor> {
    if sum.elem_count() == 0 {
        return none(sum, dtype);
    }
    Ok((sum * coef)?.to_dtype(dtype)?)
}

/// A tensor without elements: candle's operations fail on such ones on CUDA.
fn none(like: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::zeros(like.shape(), dtype, like.device())?)
}

/// The edited gradient in f32, or in f64 for f64, not rounded back.
pub(super) fn edit_wide(grad: &Tensor, edit: GradEdit<'_>) -> Result<Tensor> {
    let x = wide(grad)?;
    let (GradEdit::Units(UnitEdit {
        zero_non_finite, ..
    })
    | GradEdit::All(
        Edit::Scale {
            zero_non_finite, ..
        }
        | Edit::Clamp {
            zero_non_finite, ..
        },
    )) = edit;
    let x = if zero_non_finite {
        is_finite(&x)?.where_cond(&x, &x.zeros_like()?)?
    } else {
        x
    };
    match edit {
        GradEdit::All(Edit::Scale { clip_coef, .. }) => scaled(x, clip_coef),
        GradEdit::All(Edit::Clamp {
            clip_value,
            clip_coef,
            ..
        }) => {
            let clamped = is_nan(&x)?.where_cond(&x, &x.clamp(-clip_value, clip_value)?)?;
            scaled(clamped, clip_coef)
        }
        GradEdit::Units(edit) => units::scaled(&x, edit),
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
    Ok(((x * a)? * b)?)
}
