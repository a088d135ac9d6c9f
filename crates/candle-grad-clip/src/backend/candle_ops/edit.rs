//! Edits each gradient into a new tensor.

use candle_core::{DType, Tensor};
use candle_grad_clip_kernels::{Edit, GradEdit, UnitEdit, Units, coef_factors};

use super::tensor_ops::{none, on_cpu, times, wide, wide_tensor};
use crate::backend::cpu;
use crate::error::Result;
use crate::tensors::wide_dtype;
use crate::threads::{Work, run};

/// Returns the edited gradient as a new tensor. `is_finite` says whether all its elements are
/// finite.
pub(crate) fn edit(grad: &Tensor, edit: GradEdit<'_>, is_finite: bool) -> Result<Tensor> {
    let edited = edit_wide(grad, edit, is_finite)?;
    Ok(edited.to_dtype(grad.dtype())?.detach())
}

/// Returns `sum` plus the edited gradient as a new tensor: f64 for f64 gradients, else f32.
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

/// `sum * coef` in `dtype`.
pub(crate) fn round(sum: &Tensor, coef: f64, dtype: DType) -> Result<Tensor> {
    if sum.elem_count() == 0 {
        return none(sum, dtype);
    }
    Ok(times(sum, coef)?.to_dtype(dtype)?)
}

/// The edited gradient in f64 for f64, else in f32, before rounding to its dtype. `is_finite` says
/// whether all its elements are finite.
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
        GradEdit::All(Edit::Scale { clip_coef, .. }) => scale(x, clip_coef),
        GradEdit::All(Edit::Clamp {
            clip_value,
            clip_coef,
            ..
        }) => scale(x.clamp(-clip_value, clip_value)?, clip_coef),
        GradEdit::Units(edit) => scale_units(&x, edit),
    }
}

/// Whether the edit treats non-finite elements differently from plain arithmetic.
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

/// `x * clip_coef`, in two factors: candle rounds a factor to f32, where a tiny one becomes 0.
fn scale(x: Tensor, clip_coef: f64) -> Result<Tensor> {
    if clip_coef == 1.0 {
        return Ok(x);
    }
    let [a, b] = coef_factors(clip_coef);
    let x = times(&x, a)?;
    if b == 1.0 { Ok(x) } else { times(&x, b) }
}

/// Multiplies each unit of a wide tensor by its coefficient.
fn scale_units(x: &Tensor, edit: UnitEdit<'_>) -> Result<Tensor> {
    let (rows, columns) = match edit.units {
        Units::Rows(length) => (x.elem_count() / length.max(1), length),
        Units::Columns(columns) => (x.elem_count() / columns.max(1), columns),
    };
    let shape = match edit.units {
        Units::Rows(_) => (edit.coefs.len(), 1),
        Units::Columns(_) => (1, edit.coefs.len()),
    };
    let factor = |which: usize| -> Result<Tensor> {
        let values: Vec<f64> = edit.coefs.iter().map(|c| coef_factors(*c)[which]).collect();
        wide_tensor(values, shape, x)
    };
    let mut matrix = x.reshape((rows, columns))?.broadcast_mul(&factor(0)?)?;
    if edit.coefs.iter().any(|coef| coef_factors(*coef)[1] != 1.0) {
        matrix = matrix.broadcast_mul(&factor(1)?)?;
    }
    Ok(matrix.reshape(x.shape())?)
}
