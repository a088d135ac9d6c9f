//! Finite gradients that their edit would make infinite.

use std::sync::Arc;

use candle_core::DType;
use candle_core::backprop::GradStore;
use candle_grad_clip_kernels::{Edit, GradEdit, NormType, Stats};
use half::f16;

use crate::clip::Edits;
use crate::error::{Error, Result};
use crate::gradients::{Request, UnitPlan};
use crate::pipeline::measure::measure;
use crate::pipeline::units::measure_units;
use crate::tensors::wide_dtype;
use crate::vars::NamedVars;

/// The first gradient that would overflow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Overflow {
    /// The index of its Var.
    pub(super) index: usize,
    largest: f64,
    coef: f64,
    /// The dtype of the product.
    dtype: DType,
}

impl Overflow {
    pub(super) fn error(self, names: &[String]) -> Error {
        Error::Overflow {
            var: names[self.index].clone(),
            largest: self.largest,
            coef: self.coef,
            dtype: self.dtype,
        }
    }
}

/// Finds the first gradient that its edit would make infinite. Reads the gradients only if a
/// coefficient is above 1.
pub(super) fn find(
    vars: &NamedVars,
    units: Option<&Arc<UnitPlan>>,
    grads: &GradStore,
    edits: &Edits,
    is_fused: bool,
) -> Result<Option<Overflow>> {
    let grows = |index| largest_coef(edits.of(index)) > 1.0;
    if !(0..vars.vars().len()).any(grows) {
        return Ok(None);
    }
    let measured = match units {
        Some(units) => measure_units(vars.list(), grads, NormType::Inf, units, 1.0)?,
        None => measure(vars.list(), grads, Request::norm(NormType::Inf))?,
    };
    let largest = |stats: Stats| stats.power.root(NormType::Inf).value();
    for (index, (entry, var)) in measured.entries.iter().zip(vars.vars()).enumerate() {
        if entry.grad.is_none() {
            continue;
        }
        let dtype = match var.dtype() {
            // Other optimizers get gradients in their own dtype.
            dtype if is_fused => wide_dtype(dtype),
            dtype => dtype,
        };
        let found = |largest: f64, coef: f64| {
            (!fits(largest, coef, dtype)).then_some(Overflow {
                index,
                largest,
                coef,
                dtype,
            })
        };
        let whole = largest(entry.measured.stats);
        let overflow = match edits.of(index) {
            GradEdit::All(Edit::Scale { clip_coef, .. }) => found(whole, clip_coef),
            GradEdit::All(Edit::Clamp {
                clip_value,
                clip_coef,
                ..
            }) => found(whole.min(clip_value), clip_coef),
            GradEdit::Units(edit) => {
                let units = measured.units.as_ref();
                let units = units.map_or(&[][..], |all| &all.grads[all.plan.range(index)]);
                let mut each = units.iter().zip(edit.coefs);
                each.find_map(|(unit, coef)| found(largest(*unit), *coef))
            }
        };
        if overflow.is_some() {
            return Ok(overflow);
        }
    }
    Ok(None)
}

fn largest_coef(edit: GradEdit<'_>) -> f64 {
    match edit {
        GradEdit::All(Edit::Scale { clip_coef, .. } | Edit::Clamp { clip_coef, .. }) => clip_coef,
        GradEdit::Units(edit) => edit.coefs.iter().fold(0.0, |max, coef| coef.max(max)),
    }
}

/// Whether the product is finite, computed as the edit computes it.
fn fits(largest: f64, coef: f64, dtype: DType) -> bool {
    let wide = largest as f32 * coef as f32;
    match dtype {
        DType::F64 => (largest * coef).is_finite(),
        DType::F16 => f16::from_f32(wide).is_finite(),
        DType::BF16 => half::bf16::from_f32(wide).is_finite(),
        _ => wide.is_finite(),
    }
}
