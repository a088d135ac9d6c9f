//! The step: set the limit, collect and measure, decide, apply, report, observe.

use std::sync::OnceLock;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, TensorId};
use candle_grad_clip_kernels::Edit;

use super::core::{Core, Schedule};
use super::inner::{Foreign, Inner};
use super::nested;
use super::overflow::{self, Overflow};
use super::record::{StepPath, StepRecord};
use super::report::StepReport;
use super::skips::Skip;
use super::trained_vars::unscaled_others;
use crate::accumulate::hides_overflow;
use crate::clip::{Action, Decision, Edits, NonFinite};
use crate::error::{Error, Result};
use crate::gradients::{Measurements, Request};
use crate::loss_scaler::LossScaler;
use crate::optim::{FusedParts, GradEdits};
use crate::pipeline::edit::{edit_copies, edit_in_place, insert};
use crate::pipeline::measure::{measure_unscaled, non_finite_error};
use crate::pipeline::units::measure_units;
use crate::skip_reason::SkipReason;

/// The owner of the gradients.
pub(super) enum Grads<'g> {
    /// The caller's gradients: copies are edited.
    Lent(&'g GradStore),
    /// Gradients from `backward` of this loss: edited in place.
    Owned { store: GradStore, loss: &'g Tensor },
}

impl Grads<'_> {
    fn store(&self) -> &GradStore {
        match self {
            Self::Lent(store) => store,
            Self::Owned { store, .. } => store,
        }
    }

    /// Runs the optimizer's step with the edited gradients.
    fn step(self, inner: &mut dyn Foreign, edited: Edited) -> candle_core::Result<()> {
        let mut store = match (self, edited.copies) {
            (Self::Lent(store), None) => return inner.step(store),
            (Self::Lent(_), Some(copies)) => copies,
            (Self::Owned { store, .. }, _) => store,
        };
        insert(&mut store, edited.replacements);
        inner.step(&store)
    }
}

/// The edits that are not yet in the store: copies and replacements.
#[derive(Default)]
struct Edited {
    /// Copies of all gradients, if the originals must not change.
    copies: Option<GradStore>,
    replacements: Vec<(TensorId, Tensor)>,
}

impl Core {
    /// Checks that don't depend on the gradients. Also looks for new Vars.
    pub(super) fn check_before_step(&mut self, inner: &Inner<'_>) -> Result<()> {
        if self.loss_scaler.is_some() && nested::is_inside() {
            return Err(Error::NestedLossScaler);
        }
        inner.check_learning_rate()?;
        self.trained.notice_growth();
        Ok(())
    }

    /// Takes or skips a step. All steps go through here.
    pub(super) fn step(
        &mut self,
        inner: &mut Inner<'_>,
        grads: Grads<'_>,
        loss: Option<f64>,
    ) -> Result<StepReport> {
        self.pending.notice(self.vars.names(), &mut self.counters)?;
        self.set_scheduled_limit()?;
        if let Some(report) = self.step_on_device(inner, grads.store())? {
            return Ok(report);
        }
        self.sync_counters(inner)?;

        let (measured, decision) = self.measure_and_decide(inner, grads.store(), loss)?;
        let path = match (&*inner, &grads) {
            (Inner::Fused(_), _) => StepPath::Fused,
            (_, Grads::Lent(_)) => StepPath::Copied,
            (_, Grads::Owned { .. }) => StepPath::InPlace,
        };
        let report = self.report(&measured, &decision, path);
        let skipped_inside = match (inner, &decision.action) {
            (_, Action::Skip(_)) => None,
            (Inner::Fused(parts), action) => {
                self.fused_step(parts, grads.store(), &measured, action)?;
                None
            }
            (Inner::Foreign(inner), action) => {
                let edited = self.edit(&grads, &measured, action)?;
                nested::step(|| grads.step(*inner, edited))?
            }
        };
        Ok(self.finish(report, skipped_inside))
    }

    fn set_scheduled_limit(&mut self) -> Result<()> {
        if let Some(Schedule(limit)) = &self.schedule {
            self.policy.set_limit(limit(self.step + 1))?;
        }
        Ok(())
    }

    /// Measures and decides. An error here means that no step was taken.
    fn measure_and_decide<'g>(
        &mut self,
        inner: &Inner<'_>,
        grads: &'g GradStore,
        loss: Option<f64>,
    ) -> Result<(Measurements<'g>, Decision)> {
        let scaler = self.loss_scaler.as_ref();
        if scaler.is_some_and(LossScaler::is_enabled) && hides_overflow(grads) {
            return Err(Error::HiddenOverflow);
        }
        let mut measured = self.measure(grads, loss, self.policy.request())?;
        let non_finite = self.policy.clip().non_finite;
        let mut set_aside = self.policy.limits().set_aside(&mut measured, non_finite);
        let names = self.vars.shared_names();
        // The rule is not asked when the loss scale overflows: this step is skipped anyway.
        let overflows = self.loss_scale() > 1.0 && measured.total.stats.non_finite() > 0;
        if !overflows && let Some(bound) = self.policy.ask(&measured, names, self.step + 1)? {
            let request = Request {
                clip_value: Some(bound),
                ..self.policy.request()
            };
            measured = self.measure(grads, loss, request)?;
            set_aside = self.policy.limits().set_aside(&mut measured, non_finite);
        }
        let mut decision = if overflows {
            self.skip_for_scale(&measured)
        } else {
            self.decide(inner, grads, &measured)?
        };
        let scale = self.loss_scale();
        let limits = self.policy.limits();
        limits.put_back(set_aside, &mut measured, &mut decision, scale);
        Ok((measured, decision))
    }

    /// Measures the gradients without the loss scale.
    fn measure<'g>(
        &self,
        grads: &'g GradStore,
        loss: Option<f64>,
        request: Request,
    ) -> Result<Measurements<'g>> {
        let (vars, scale) = (self.vars.list(), self.loss_scale());
        let measured = match self.policy.units() {
            Some(units) => measure_units(vars, grads, request.norm_type, units, scale),
            None => measure_unscaled(vars, grads, request, scale),
        };
        Ok(Measurements { loss, ..measured? })
    }

    /// Decides, and counts a skip.
    fn decide(
        &mut self,
        inner: &Inner<'_>,
        grads: &GradStore,
        measured: &Measurements<'_>,
    ) -> Result<Decision> {
        let scale = self.loss_scale();
        let decision = self.policy.decide(measured).unscaling(scale);
        if let Action::Skip(reason) = decision.action {
            self.skip(reason, measured, None)?;
            return Ok(decision);
        }
        match self.overflow(inner, grads, &decision.action)? {
            Some(overflow) => {
                self.skip(SkipReason::Overflow, measured, Some(overflow))?;
                Ok(Decision::skip(SkipReason::Overflow))
            }
            None => Ok(decision),
        }
    }

    /// The loss scale is too large. The scaler lowers it, so this is not counted as a skip.
    fn skip_for_scale(&self, measured: &Measurements<'_>) -> Decision {
        let (step, scale) = (self.step + 1, self.loss_scale());
        let non_finite = measured.total.stats.non_finite();
        tracing::debug!(
            step,
            scale,
            non_finite,
            "step skipped: the loss scale is too large"
        );
        Decision::skip(SkipReason::NonFinite)
    }

    /// Counts a skip, or returns an error if the policy requires it.
    fn skip(
        &mut self,
        reason: SkipReason,
        measured: &Measurements<'_>,
        overflow: Option<Overflow>,
    ) -> Result<()> {
        let names = self.vars.names();
        let is_fault = matches!(reason, SkipReason::NonFinite | SkipReason::Overflow);
        if is_fault && self.policy.clip().non_finite == NonFinite::Error {
            return Err(match overflow {
                Some(overflow) => overflow.error(names),
                None => non_finite_error(self.vars.list(), measured),
            });
        }
        let first = overflow.map(|overflow| overflow.index);
        let first = first.or_else(|| measured.first_non_finite());
        let name = |index: usize| names[index].clone();
        self.counters.skips.count(Skip {
            reason,
            step: self.step + 1,
            var: first.filter(|_| is_fault).map(name),
            non_finite: measured.total.stats.non_finite(),
            total_norm: measured.norm().value(),
            loss: measured.loss,
            clip: self.policy.clip(),
        })
    }

    /// Finds the first gradient that its edit would make infinite, unless the policy allows it.
    ///
    /// Only a loss scale below 1 and a user's rule can do that; gradients are then read once more.
    /// The stabilizer enlarges gradients too, but only to a bounded length.
    fn overflow(
        &self,
        inner: &Inner<'_>,
        grads: &GradStore,
        action: &Action,
    ) -> Result<Option<Overflow>> {
        let may_grow = self.loss_scale() < 1.0 || self.policy.may_grow();
        match action {
            Action::Edit(edits)
                if may_grow && self.policy.clip().non_finite != NonFinite::Propagate =>
            {
                let (vars, units) = (&self.vars, self.policy.units());
                overflow::find(vars, units, grads, edits, inner.is_fused())
            }
            _ => Ok(None),
        }
    }

    /// Takes a step of fused optimizers, which apply the edits in their update.
    fn fused_step(
        &mut self,
        parts: &mut FusedParts<'_>,
        grads: &GradStore,
        measured: &Measurements<'_>,
        action: &Action,
    ) -> Result<()> {
        self.trained.adopt(parts, &self.vars)?; // again, as `inner_mut` may have put another in its place
        let nothing = Edits::All(Edit::NOTHING);
        let edits = match action {
            Action::Edit(edits) => edits,
            _ => &nothing,
        };
        let clipped = GradEdits {
            vars: &self.vars,
            entries: &measured.entries,
            edits,
            others: Edit::NOTHING.unscaling(self.loss_scale()),
        };
        parts.step(grads, clipped)
    }

    /// Edits the gradients for an optimizer that is not fused.
    fn edit(
        &mut self,
        grads: &Grads<'_>,
        measured: &Measurements<'_>,
        action: &Action,
    ) -> Result<Edited> {
        let (vars, entries) = (self.vars.list(), &measured.entries);
        if let Grads::Owned { store, loss } = grads {
            let found = entries.iter().filter(|entry| entry.grad.is_some()).count();
            self.trained.notice_unknown(loss, store, found);
        }
        let Action::Edit(edits) = action else {
            return Ok(Edited::default());
        };
        let (store, scale) = (grads.store(), self.loss_scale());
        let others = unscaled_others(&self.vars, store, scale)?;
        let mut edited = match grads {
            Grads::Lent(store) => Edited {
                copies: Some(edit_copies(vars, store, entries, edits, &mut self.scratch)?),
                replacements: Vec::new(),
            },
            Grads::Owned { store, .. } => Edited {
                copies: None,
                replacements: edit_in_place(vars, store, entries, edits)?,
            },
        };
        edited.replacements.extend(others);
        Ok(edited)
    }

    fn report(
        &mut self,
        measured: &Measurements<'_>,
        decision: &Decision,
        path: StepPath,
    ) -> StepReport {
        let step = self.step + 1;
        let known = StepRecord::new(
            step,
            measured,
            decision,
            self.policy.clip().non_finite,
            path,
        );
        let param_norms = self.with_param_norms.then(|| measured.param_norms().into());
        StepReport {
            known,
            pending: None,
            missing: self.missing.notice(&self.vars, &measured.entries),
            names: self.vars.shared_names().clone(),
            param_norms,
            record: OnceLock::new(),
        }
    }

    /// Ends a step that was taken or skipped. The rule's history is updated only now.
    fn finish(&mut self, mut report: StepReport, skipped_inside: Option<SkipReason>) -> StepReport {
        let record = &mut report.known;
        if let Some(reason) = skipped_inside {
            record.skip(reason);
        }
        self.step = record.step;
        if !record.skipped {
            self.policy.observe();
            self.counters.steps_taken += 1;
            self.counters.skips.end();
        }
        nested::tell(record.skip_reason);
        let is_finite = record.non_finite == 0;
        // Not for a step with non-finite elements that was taken.
        if let Some(scaler) = &mut self.loss_scaler
            && (is_finite || record.skipped)
        {
            scaler.update(!is_finite);
        }
        let StepRecord {
            step,
            total_norm,
            clipped_norm,
            clip_coef,
            skipped,
            ..
        } = *record;
        tracing::debug!(step, total_norm, clipped_norm, clip_coef, skipped, "step");
        record.tiny_coefs_in_a_row = if skipped || self.policy.clip().sets_lengths() {
            self.counters.tiny_coefs.in_a_row()
        } else {
            self.counters.tiny_coefs.count(step, total_norm, clip_coef)
        };
        self.last_report = Some(report.clone());
        report
    }
}
