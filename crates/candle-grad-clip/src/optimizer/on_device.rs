//! Steps that a GPU decides, in the wrapper.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_grad_clip_kernels::Edit;
use candle_nn::Optimizer;

use super::{ClippedOptimizer, nested};
use crate::clip::Edits;
use crate::error::Result;
use crate::optim::{self, Clipped};
use crate::optimizer::late::LateStep;
use crate::optimizer::report::{StepRecord, StepReport};
use crate::pipeline::measure::walk;

impl<O: Optimizer + 'static> ClippedOptimizer<O> {
    /// A step that a GPU decides, without waiting for it, where that can be: the inner optimizer is one of ours, the clip one
    /// of the global norm, to a value or none, and all gradients are on one GPU.
    pub(super) fn step_on_device(&mut self, grads: &GradStore) -> Result<Option<StepReport>> {
        self.late.notice(self.vars.names())?;
        self.schedule()?; // here only: every step comes by, whoever takes it
        let step = self.launch_step(grads)?;
        if step.is_none() {
            self.settle()?;
        }
        Ok(step)
    }

    /// Takes all that a GPU has counted: from here on the host decides, or another GPU. Waits for it, if it has the lead.
    fn settle(&mut self) -> Result<()> {
        if let Some(skips) = self.late.settle(self.vars.names())? {
            self.skips_in_a_row = skips;
        }
        match optim::fused(&mut self.inner) {
            Some(fused) => fused.trained_mut().settle(),
            None => Ok(()),
        }
    }

    fn launch_step(&mut self, grads: &GradStore) -> Result<Option<StepReport>> {
        // A wrapper around this one wants to know whether the step was skipped.
        let plain = self.loss_scaler.is_none() && !nested::is_inside();
        let (true, Some(plan)) = (plain, self.policy.device_plan()) else {
            return Ok(None);
        };
        let Some(fused) = optim::fused(&mut self.inner) else {
            return Ok(None);
        };
        if !self.vars.vars().iter().any(|var| var.device().is_cuda()) {
            return Ok(None); // before the gradients are looked up
        }
        self.trained.adopt(fused, &self.vars)?;
        if !fused.trained().gpu_leads() {
            // It did, and `inner_mut` has ended that.
            let skips = self.late.settle(self.vars.names())?;
            self.skips_in_a_row = skips.unwrap_or(self.skips_in_a_row);
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
        let clipped = Clipped {
            vars: &self.vars,
            entries: &entries,
            edits: &Edits::All(edit),
            others: Edit::NOTHING,
        };
        let result =
            fused.device_step(clipped, &plan, self.skips_in_a_row, self.with_param_norms)?;
        let Some(result) = result else {
            return Ok(None);
        };
        self.step += 1;
        let with_grad = entries.iter().enumerate();
        let with_grad = with_grad.filter(|(_, entry)| entry.grad.is_some() && entry.elements > 0);
        let with_grad = with_grad.map(|(index, _)| index).collect();
        let late = LateStep::new(
            result,
            self.policy.clip().clone(),
            self.step,
            with_grad,
            self.with_param_norms,
        );
        let late = Arc::new(late);
        self.late.push(late.clone());
        tracing::debug!(step = self.step, "step launched");
        let report = StepReport {
            record: StepRecord::launched(self.step, plan.request.norm_type),
            late: Some(late),
            missing: self.missing(&entries),
            names: self.vars.shared_names().clone(),
            param_norms: None,
        };
        self.last_report = Some(report.clone());
        Ok(Some(report))
    }
}
