//! Steps that a GPU decides: their results stay there until somebody asks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::backend::{Outcome, StepResult};
use crate::clip::{Clip, Policy};
use crate::error::{Error, Result};
use crate::gradients::{GradStats, Measurements, norm_of};
use crate::optimizer::frozen::TinyCoefs;
use crate::optimizer::report::{StepPath, StepRecord};

/// A step whose numbers are on a GPU, or were.
pub(crate) struct LateStep {
    /// What holds memory of the GPU's: until the numbers are here.
    result: Mutex<Option<Arc<dyn StepResult>>>,
    outcome: OnceLock<Outcome>,
    keeps_norms: bool,
    clip: Clip,
    step: u64,
    /// The places of the Vars that got a gradient.
    with_grad: Arc<[usize]>,
    record: OnceLock<StepRecord>,
    param_norms: OnceLock<Vec<f64>>,
}

impl LateStep {
    pub(crate) fn new(
        result: Arc<dyn StepResult>,
        clip: Clip,
        step: u64,
        with_grad: Arc<[usize]>,
        keeps_norms: bool,
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
    fn is_ready(&self) -> bool {
        self.result().is_none_or(|result| result.is_ready())
    }

    /// What the GPU told. Waits for it once.
    fn outcome(&self) -> Result<Outcome> {
        // In this order: the result is forgotten once the outcome is there.
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

    /// What the step measured and did, but for what depends on names. Waits for the GPU once.
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
        // The GPU has decided so by the same numbers; the last bit of its coefficient may be another.
        let decision = Policy::of_norms(self.clip.clone()).decide(&measured);
        let non_finite = self.clip.non_finite;
        let mut record =
            StepRecord::new(self.step, &measured, &decision, non_finite, StepPath::Fused);
        if !outcome.skipped {
            record.clip_coef = outcome.clip_coef;
        }
        Ok(self.record.get_or_init(|| record))
    }

    /// The norm of each of `vars` Vars' gradients, 0 for those without one; nothing if they were not asked for.
    pub(crate) fn param_norms(&self, vars: usize) -> Result<Option<&[f64]>> {
        if let Some(norms) = self.param_norms.get() {
            return Ok(Some(norms));
        }
        let result = self.result().filter(|_| self.keeps_norms);
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
        self.outcome()?;
        self.forget_result();
        Ok(Some(self.param_norms.get_or_init(|| norms)))
    }
}

/// The steps whose results nobody has looked at yet, the oldest first, and what those before have told.
#[derive(Default)]
pub(crate) struct LateSteps {
    waiting: VecDeque<Arc<LateStep>>,
    /// The skips in a row up to the last result that was looked at.
    skips_in_a_row: Option<u32>,
    /// Steps taken, of those whose results were looked at.
    steps_taken: u64,
    tiny_coefs: TinyCoefs,
}

impl LateSteps {
    pub(crate) fn push(&mut self, step: Arc<LateStep>) {
        self.waiting.push_back(step);
    }

    /// Looks at the results that have arrived, waiting for none.
    pub(crate) fn notice(&mut self, names: &[String]) -> Result<()> {
        while self.waiting.front().is_some_and(|step| step.is_ready()) {
            self.look_at_first(names)?;
        }
        Ok(())
    }

    /// Waits for all results; returns the skips in a row up to now, if there were any results since the last call.
    pub(crate) fn settle(&mut self, names: &[String]) -> Result<Option<u32>> {
        while !self.waiting.is_empty() {
            self.look_at_first(names)?;
        }
        Ok(self.skips_in_a_row.take())
    }

    /// As [`LateSteps::settle`], without looking: for a save.
    pub(crate) fn skips_in_a_row(&self) -> Result<Option<u32>> {
        match self.waiting.back() {
            Some(last) => Ok(Some(last.outcome()?.skips_in_a_row)),
            None => Ok(self.skips_in_a_row),
        }
    }

    /// Steps taken, of all that were launched. Waits for their results.
    pub(crate) fn steps_taken(&self) -> Result<u64> {
        let mut taken = self.steps_taken;
        for step in &self.waiting {
            taken += u64::from(!step.outcome()?.skipped);
        }
        Ok(taken)
    }

    /// Warns of a skipped step; the error if it is one too many.
    fn look_at_first(&mut self, names: &[String]) -> Result<()> {
        let Some(step) = self.waiting.front().cloned() else {
            return Ok(());
        };
        let outcome = step.outcome()?;
        let (number, max_skips) = (step.step, step.clip.max_skips);
        let bad = step.with_grad.get(outcome.first_bad);
        let var = bad.map_or_else(String::new, |&index| names[index].clone());
        self.waiting.pop_front();
        self.skips_in_a_row = Some(outcome.skips_in_a_row);
        if !outcome.skipped {
            self.steps_taken += 1;
            let norm_type = step.clip.request().norm_type;
            let total_norm = norm_of(outcome.total.stats, norm_type);
            self.tiny_coefs.count(number, total_norm, outcome.clip_coef);
            return Ok(());
        }
        if outcome.skips_in_a_row > max_skips {
            return Err(Error::TooManySkips {
                skips: outcome.skips_in_a_row,
                max_skips,
                var,
            });
        }
        tracing::warn!(
            step = number,
            var,
            non_finite = outcome.total.stats.non_finite(),
            "step skipped: gradients are not finite"
        );
        Ok(())
    }
}
