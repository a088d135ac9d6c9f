//! Steps that a GPU decides: their results stay there until somebody asks.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use crate::backend::StepResult;
use crate::clip::{Clip, Limits, RuleState};
use crate::measure::{GradStats, Measurements, norm_of};
use crate::report::{StepPath, StepRecord};
use crate::{Error, Result};

/// A step whose numbers are on a GPU, or were.
pub(crate) struct LateStep {
    result: Arc<dyn StepResult>,
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
    ) -> Self {
        Self {
            result,
            clip,
            step,
            with_grad,
            record: OnceLock::new(),
            param_norms: OnceLock::new(),
        }
    }

    /// What the step measured and did, but for what depends on names. Waits for the GPU once.
    pub(crate) fn record(&self) -> Result<&StepRecord> {
        if let Some(record) = self.record.get() {
            return Ok(record);
        }
        let outcome = self.result.read()?;
        let measured = Measurements {
            entries: Vec::new(),
            total: outcome.total,
            norm_type: self.clip.request().norm_type,
            units: None,
            loss: None,
        };
        // The GPU has decided so by the same numbers; the last bit of its coefficient may be another.
        let decision = self
            .clip
            .decide(&RuleState::default(), &measured, &Limits::default(), None);
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
        let Some(grads) = self.result.read_grads()? else {
            return Ok(None);
        };
        let norm_type = self.clip.request().norm_type;
        let mut norms = vec![0.0; vars];
        for (&index, GradStats { stats, .. }) in self.with_grad.iter().zip(grads) {
            norms[index] = norm_of(stats, norm_type);
        }
        Ok(Some(self.param_norms.get_or_init(|| norms)))
    }
}

/// The steps whose results nobody has looked at yet, the oldest first, and what those before have told.
#[derive(Default)]
pub(crate) struct LateSteps {
    waiting: VecDeque<Arc<LateStep>>,
    /// The skips in a row up to the last result that was looked at.
    skips_in_a_row: Option<u32>,
}

impl LateSteps {
    pub(crate) fn push(&mut self, step: Arc<LateStep>) {
        self.waiting.push_back(step);
    }

    /// Looks at the results that have arrived, waiting for none.
    pub(crate) fn notice(&mut self, names: &[String]) -> Result<()> {
        while self
            .waiting
            .front()
            .is_some_and(|step| step.result.is_ready())
        {
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
            Some(last) => Ok(Some(last.result.read()?.skips_in_a_row)),
            None => Ok(self.skips_in_a_row),
        }
    }

    /// Warns of a skipped step; the error if it is one too many.
    fn look_at_first(&mut self, names: &[String]) -> Result<()> {
        let Some(step) = self.waiting.front() else {
            return Ok(());
        };
        let outcome = step.result.read()?;
        let (number, max_skips) = (step.step, step.clip.max_skips);
        let bad = step.with_grad.get(outcome.first_bad);
        let var = bad.map_or_else(String::new, |&index| names[index].clone());
        self.waiting.pop_front();
        self.skips_in_a_row = Some(outcome.skips_in_a_row);
        if !outcome.skipped {
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
