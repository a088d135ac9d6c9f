//! Steps that a GPU decides: their results stay there until they are read.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::counters::Counters;
use super::record::{StepPath, StepRecord};
use super::skips::Skip;
use super::tiny_coefs;
use crate::backend::{Outcome, StepResult};
use crate::clip::{Clip, Policy};
use crate::error::Result;
use crate::gradients::{GradStats, Measurements, norm_of};
use crate::skip_reason::SkipReason;

/// A step whose results are, or were, on a GPU.
pub(crate) struct PendingStep {
    /// Holds GPU memory; `None` after the results are read.
    result: Mutex<Option<Arc<dyn StepResult>>>,
    outcome: OnceLock<Outcome>,
    keeps_norms: bool,
    clip: Clip,
    step: u64,
    /// The indices of the Vars with a gradient.
    with_grad: Arc<[usize]>,
    record: OnceLock<StepRecord>,
    param_norms: OnceLock<Vec<f64>>,
    tiny_coefs: Mutex<TinyCoefsInARow>,
}

/// The number of steps in a row with a tiny coefficient.
pub(crate) enum TinyCoefsInARow {
    /// Up to the step before.
    Before(u64),
    /// Up to the step before, which nobody has looked at.
    After(Arc<PendingStep>),
    /// Up to this step.
    Here(u64),
}

impl PendingStep {
    pub(crate) fn new(
        result: Arc<dyn StepResult>,
        clip: Clip,
        step: u64,
        with_grad: Arc<[usize]>,
        keeps_norms: bool,
        tiny_coefs: TinyCoefsInARow,
    ) -> Self {
        Self {
            result: Mutex::new(Some(result)),
            outcome: OnceLock::new(),
            keeps_norms,
            clip,
            step,
            with_grad,
            record: OnceLock::new(),
            param_norms: OnceLock::new(),
            tiny_coefs: Mutex::new(tiny_coefs),
        }
    }

    fn result(&self) -> Option<Arc<dyn StepResult>> {
        let result = self.result.lock();
        result.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn forget_result(&self) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether reading would not wait.
    pub(super) fn is_ready(&self) -> bool {
        self.result().is_none_or(|result| result.is_ready())
    }

    /// The GPU's outcome. Waits for the GPU once.
    fn outcome(&self) -> Result<Outcome> {
        // Take the result first: it is dropped once the outcome is set.
        let result = self.result();
        if let Some(outcome) = self.outcome.get() {
            return Ok(*outcome);
        }
        let Some(result) = result else {
            return Err(candle_core::Error::msg("the step's result is gone").into());
        };
        let outcome = *self.outcome.get_or_init({
            let outcome = result.read()?;
            move || outcome
        });
        if !self.keeps_norms {
            self.forget_result();
        }
        Ok(outcome)
    }

    fn total_norm(&self, outcome: &Outcome) -> f64 {
        norm_of(outcome.total.stats, self.clip.request().norm_type)
    }

    /// The steps in a row with a tiny coefficient, up to this one. The results of earlier steps,
    /// which this reads, arrive earlier.
    fn tiny_coefs_in_a_row(&self) -> Result<u64> {
        let tiny_coefs = || {
            self.tiny_coefs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let earlier = match &*tiny_coefs() {
            TinyCoefsInARow::Here(in_a_row) => return Ok(*in_a_row),
            TinyCoefsInARow::Before(in_a_row) => Ok(*in_a_row),
            TinyCoefsInARow::After(step) => Err(step.clone()),
        };
        // Not under the lock.
        let mut in_a_row = earlier.or_else(|step| step.tiny_coefs_in_a_row())?;
        let outcome = self.outcome()?;
        if !outcome.skipped {
            in_a_row = tiny_coefs::after(in_a_row, self.total_norm(&outcome), outcome.clip_coef);
        }
        *tiny_coefs() = TinyCoefsInARow::Here(in_a_row);
        Ok(in_a_row)
    }

    /// The step's record without the fields that need names. Waits for the GPU once.
    pub(crate) fn record(&self) -> Result<&StepRecord> {
        if let Some(record) = self.record.get() {
            return Ok(record);
        }
        let outcome = self.outcome()?;
        let measured = Measurements {
            entries: Vec::new(),
            total: outcome.total,
            norm_type: self.clip.request().norm_type,
            units: None,
            loss: None,
        };
        // The GPU decided from the same numbers, but the last bit of its coefficient may differ.
        let decision = Policy::of_norms(self.clip.clone()).decide(&measured);
        let non_finite = self.clip.non_finite;
        let mut record =
            StepRecord::new(self.step, &measured, &decision, non_finite, StepPath::Fused);
        if !outcome.skipped {
            record.clip_coef = outcome.clip_coef;
        }
        record.tiny_coefs_in_a_row = self.tiny_coefs_in_a_row()?;
        Ok(self.record.get_or_init(|| record))
    }

    /// The norm of each Var's gradient, 0 for those without one. `None` if the norms were not kept.
    pub(crate) fn param_norms(&self, vars: usize) -> Result<Option<&[f64]>> {
        // In this order: the result is forgotten once the norms are there.
        let result = self.result().filter(|_| self.keeps_norms);
        if let Some(norms) = self.param_norms.get() {
            return Ok(Some(norms));
        }
        let Some(grads) = result
            .map(|result| result.read_grads())
            .transpose()?
            .flatten()
        else {
            return Ok(None);
        };
        let norm_type = self.clip.request().norm_type;
        let mut norms = vec![0.0; vars];
        for (&index, GradStats { stats, .. }) in self.with_grad.iter().zip(grads) {
            norms[index] = norm_of(stats, norm_type);
        }
        let norms = self.param_norms.get_or_init(|| norms);
        self.outcome()?;
        self.forget_result();
        Ok(Some(norms))
    }
}

/// The steps whose results nobody has looked at yet, the oldest first.
#[derive(Default)]
pub(crate) struct PendingSteps {
    waiting: VecDeque<Arc<PendingStep>>,
}

impl PendingSteps {
    /// What is known of tiny coefficients before the next step.
    pub(super) fn tiny_coefs(&self, counters: &Counters) -> TinyCoefsInARow {
        match self.waiting.back() {
            Some(last) => TinyCoefsInARow::After(last.clone()),
            None => TinyCoefsInARow::Before(counters.tiny_coefs.in_a_row()),
        }
    }

    pub(crate) fn push(&mut self, step: Arc<PendingStep>) {
        self.waiting.push_back(step);
    }

    /// Looks at the results that have arrived, waiting for none.
    pub(super) fn notice(&mut self, names: &[String], counters: &mut Counters) -> Result<()> {
        while self.waiting.front().is_some_and(|step| step.is_ready()) {
            self.look_at_first(names, counters)?;
        }
        Ok(())
    }

    /// Waits for all results, and counts their skips.
    pub(super) fn wait_for_all(&mut self, names: &[String], counters: &mut Counters) -> Result<()> {
        while !self.waiting.is_empty() {
            self.look_at_first(names, counters)?;
        }
        Ok(())
    }

    /// The skips in a row after the last step, if it is not yet processed; for a save.
    pub(super) fn skips_in_a_row(&self) -> Result<Option<u32>> {
        let last = self.waiting.back().map(|last| last.outcome());
        Ok(last.transpose()?.map(|outcome| outcome.skips_in_a_row))
    }

    /// Steps taken, of those that nobody has looked at. Waits for their results.
    pub(crate) fn steps_taken(&self) -> Result<u64> {
        let mut taken = 0;
        for step in &self.waiting {
            taken += u64::from(!step.outcome()?.skipped);
        }
        Ok(taken)
    }

    fn look_at_first(&mut self, names: &[String], counters: &mut Counters) -> Result<()> {
        let Some(step) = self.waiting.front().cloned() else {
            return Ok(());
        };
        let outcome = step.outcome()?;
        step.tiny_coefs_in_a_row()?; // frees the step before
        self.waiting.pop_front();
        let stats = outcome.total.stats;
        let norm_type = step.clip.request().norm_type;
        if !outcome.skipped {
            counters.skips.end();
            counters.steps_taken += 1;
            let total_norm = step.total_norm(&outcome);
            counters
                .tiny_coefs
                .count(step.step, total_norm, outcome.clip_coef);
            return Ok(());
        }
        let bad = step.with_grad.get(outcome.first_bad);
        let skips = &mut counters.skips;
        skips.in_a_row = outcome.skips_in_a_row.saturating_sub(1); // the GPU has counted this one
        skips.count(Skip {
            reason: SkipReason::NonFinite,
            step: step.step,
            var: bad.map(|&index| names[index].clone()),
            non_finite: stats.non_finite(),
            total_norm: stats.power.root(norm_type).value(),
            loss: None,
            clip: &step.clip,
        })
    }
}
