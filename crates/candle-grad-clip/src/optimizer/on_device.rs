//! Steps of the wrapper that a GPU decides.

use std::sync::{Arc, OnceLock};

use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_grad_clip_kernels::Edit;

use super::core::Core;
use super::inner::Inner;
use super::nested;
use super::pending::PendingStep;
use super::record::StepRecord;
use super::report::StepReport;
use crate::backend::StepResult;
use crate::clip::Edits;
use crate::error::Result;
use crate::gradients::{Entry, Plan};
use crate::optim::GradEdits;
use crate::pipeline::measure::walk;

impl Core {
    /// Fetches the GPU's counters, if it has them, and waits for it. After this the host, or
    /// another GPU, decides.
    pub(super) fn sync_counters(&mut self, inner: &mut Inner<'_>) -> Result<()> {
        self.pending
            .wait_for_all(self.vars.names(), &mut self.counters)?;
        match inner {
            Inner::Fused(parts) => parts.try_for_each(|fused| fused.trained_mut().sync_counters()),
            Inner::Foreign(_) => Ok(()),
        }
    }

    /// Launches a step that a GPU decides, without waiting. Returns `None` if this is impossible.
    /// It requires one fused optimizer, a global norm clip, a value clip or none, and all gradients
    /// on one GPU.
    pub(super) fn step_on_device(
        &mut self,
        inner: &mut Inner<'_>,
        grads: &GradStore,
    ) -> Result<Option<StepReport>> {
        let (Inner::Fused(parts), Some(plan)) = (inner, self.device_plan()) else {
            return Ok(None);
        };
        self.trained.adopt(parts, &self.vars)?;
        let Some(fused) = parts.single() else {
            return Ok(None);
        };
        if !fused.trained().gpu_owns_counters() {
            // The host decided last, so it has to know all that a GPU has counted before.
            self.pending
                .wait_for_all(self.vars.names(), &mut self.counters)?;
        }
        let entries = walk(self.vars.list(), grads, None)?;
        let edit = match plan.request.clip_value {
            Some(clip_value) => Edit::Clamp {
                clip_value,
                clip_coef: 1.0,
                zero_non_finite: false,
            },
            None => Edit::NOTHING,
        };
        let clipped = GradEdits {
            vars: &self.vars,
            entries: &entries,
            edits: &Edits::All(edit),
            others: Edit::NOTHING,
        };
        let result = fused.device_step(
            clipped,
            &plan,
            self.counters.skips.in_a_row,
            self.with_param_norms,
        )?;
        let Some(result) = result else {
            return Ok(None);
        };
        Ok(Some(self.launched(result, &plan, &entries)))
    }

    /// The decision to leave to a GPU, if possible.
    fn device_plan(&self) -> Option<Plan> {
        // An outer wrapper needs to know whether the step was skipped.
        let is_plain = self.loss_scaler.is_none() && !nested::is_inside();
        let is_cuda = |var: &Var| var.device().is_cuda();
        let plan = self.policy.device_plan().filter(|_| is_plain)?;
        self.vars.vars().iter().any(is_cuda).then_some(plan)
    }

    /// The report of a launched step.
    fn launched(
        &mut self,
        result: Arc<dyn StepResult>,
        plan: &Plan,
        entries: &[Entry<'_>],
    ) -> StepReport {
        self.step += 1;
        let with_grad = entries.iter().enumerate();
        let with_grad = with_grad.filter(|(_, entry)| entry.grad.is_some() && entry.elements > 0);
        let with_grad = with_grad.map(|(index, _)| index).collect();
        let pending = PendingStep::new(
            result,
            self.policy.clip().clone(),
            self.step,
            with_grad,
            self.with_param_norms,
            self.pending.tiny_coefs(&self.counters),
        );
        let pending = Arc::new(pending);
        self.pending.push(pending.clone());
        tracing::debug!(step = self.step, "step launched");
        let report = StepReport {
            known: StepRecord::launched(self.step, plan.request.norm_type),
            pending: Some(pending),
            missing: self.missing.notice(&self.vars, entries),
            names: self.vars.shared_names().clone(),
            param_norms: None,
            record: OnceLock::new(),
        };
        self.last_report = Some(report.clone());
        report
    }
}
