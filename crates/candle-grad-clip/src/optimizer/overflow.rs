//! Gradients that are finite as they came, and would not be as they are written.

use candle_core::DType;
use candle_core::backprop::GradStore;
use candle_grad_clip_kernels::{Edit, GradEdit, NormType, Stats};
use candle_nn::Optimizer;
use half::f16;

use super::ClippedOptimizer;
use crate::clip::{Action, Decision, NonFinite};
use crate::error::{Error, Result};
use crate::gradients::Request;
use crate::optim;
use crate::pipeline::measure::measure;
use crate::pipeline::units::measure_units;
use crate::tensors::wide_dtype;

/// The first gradient that would not be finite.
#[derive(Debug, Clone, Copy)]
pub(super) struct Overflow {
    /// The place of its Var.
    pub(super) index: usize,
    largest: f64,
    coef: f64,
    /// What the product would be kept in.
    dtype: DType,
}

impl<O: Optimizer + 'static> ClippedOptimizer<O> {
    /// Finds a gradient that its edit would make infinite, unless the policy lets that pass.
    ///
    /// The clips multiply by 1 at most. Only a loss scale below 1 and a rule of the user's make gradients larger; then they are read
    /// once more.
    pub(super) fn overflow(
        &mut self,
        grads: &GradStore,
        decision: &Decision,
    ) -> Result<Option<Overflow>> {
        let Action::Edit(edits) = &decision.action else {
            return Ok(None);
        };
        let may_grow = self.loss_scale() < 1.0 || self.policy.may_grow();
        let grows = |index| largest_coef(edits.of(index)) > 1.0;
        if !may_grow
            || self.policy.clip().non_finite == NonFinite::Propagate
            || !(0..self.vars.vars().len()).any(grows)
        {
            return Ok(None);
        }
        let vars = self.vars.list();
        let measured = match self.policy.units() {
            Some(units) => measure_units(vars, grads, NormType::Inf, units, 1.0)?,
            None => measure(vars, grads, Request::norm(NormType::Inf))?,
        };
        // Around other optimizers the gradients themselves are written.
        let is_fused = optim::fused(&mut self.inner).is_some();
        let largest = |stats: Stats| stats.power.root(NormType::Inf).value();
        for (index, (entry, var)) in measured.entries.iter().zip(self.vars.vars()).enumerate() {
            if entry.grad.is_none() {
                continue;
            }
            let dtype = match var.dtype() {
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

    pub(super) fn overflow_error(&self, overflow: Overflow) -> Error {
        Error::Overflow {
            var: self.vars.names()[overflow.index].clone(),
            largest: overflow.largest,
            coef: overflow.coef,
            dtype: overflow.dtype,
        }
    }
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
