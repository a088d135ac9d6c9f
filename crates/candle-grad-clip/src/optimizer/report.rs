//! The report of a step, as returned to the caller.

use std::sync::{Arc, OnceLock};

use super::pending::PendingStep;
use super::record::{StepPath, StepRecord};
use crate::error::Result;

/// The report of one step, from [`ClippedOptimizer::step_report`] and `last_report`.
///
/// A report is cheap to clone, and a report that you keep never changes. If a GPU decides the
/// steps, the numbers may still be there: reading them may wait for it and may fail.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::{Clip, ClippedOptimizer, StepPath};
/// use candle_nn::{Optimizer, SGD};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
/// let unused = Var::new(0f64, &Device::Cpu)?;
/// let opt = SGD::new(vec![w.clone(), unused.clone()], 0.1)?;
/// let mut opt = ClippedOptimizer::wrap(opt, vec![w.clone(), unused], Clip::norm(1.0))?;
/// let report = opt.backward_step_report(&(w.sqr()?.sum_all()? / 2.0)?)?;
/// assert_eq!(report.total_norm()?, 5.0); // before
/// assert!((report.clip_coef()? - 0.2).abs() < 1e-6);
/// assert_eq!(report.missing_grads(), ["var.1"]);
/// assert_eq!(report.path(), StepPath::InPlace);
/// let record = report.record()?; // all numbers, as plain data
/// assert!((record.clipped_norm - 1.0).abs() < 1e-6); // after
/// # Ok(())
/// # }
/// ```
///
/// [`ClippedOptimizer::step_report`]: crate::ClippedOptimizer::step_report
#[derive(Clone)]
pub struct StepReport {
    /// The known part of the record; for a step that a GPU decides, without its numbers.
    pub(super) known: StepRecord,
    /// The results of a step that a GPU decides.
    pub(super) pending: Option<Arc<PendingStep>>,
    pub(super) missing: Arc<[String]>,
    /// The names of all Vars, in their order.
    pub(super) names: Arc<[String]>,
    pub(super) param_norms: Option<Arc<[f64]>>,
    /// The full record, after the first request.
    pub(super) record: OnceLock<Arc<StepRecord>>,
}

/// Shows [`StepReport::record`], or the step's number where that would wait for a GPU.
impl std::fmt::Debug for StepReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_tuple("StepReport");
        if self.is_ready() {
            shown.field(&self.record()).finish()
        } else {
            shown.field(&self.known.step).finish()
        }
    }
}

impl StepReport {
    /// The full record of the step, as plain data.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let report = opt.backward_step_report(&loss)?;
    /// let record = report.record()?;
    /// println!("{},{},{}", record.step, record.total_norm, record.clipped_norm); // a line of CSV
    /// assert!(record.missing_grads.is_empty());
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// A failure to read the numbers from a GPU.
    pub fn record(&self) -> Result<&StepRecord> {
        if let Some(record) = self.record.get() {
            return Ok(record);
        }
        let record = StepRecord {
            missing_grads: self.missing.to_vec(),
            param_norms: self.named_norms()?,
            ..self.numbers()?.clone()
        };
        Ok(self.record.get_or_init(|| Arc::new(record)))
    }

    /// The step's number, from 1. Skipped steps count.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.known.step
    }

    /// Whether the numbers are there: reading them does not wait for a GPU. Always true unless a
    /// GPU decides the steps.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let report = opt.backward_step_report(&loss)?;
    /// if report.is_ready() {
    ///     println!("{}", report.total_norm()?); // else: look again after the next step
    /// }
    /// # assert!(report.is_ready());
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.pending.as_ref().is_none_or(|step| step.is_ready())
    }

    /// The names of the Vars without a gradient, except those that were declared by
    /// `ignore_missing_grads`.
    ///
    /// Such a Var is not trained. The usual cause is an operation without a backward pass:
    /// `LayerNorm::forward`, `RmsNorm::forward`, `softmax_last_dim` and `rope` of candle-nn cut the
    /// graph without an error (candle issues 3011 and 3569).
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer};
    /// # use candle_nn::{Optimizer, SGD};
    /// # let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
    /// # let cut_off = Var::new(0f64, &Device::Cpu)?;
    /// # let sgd = SGD::new(vec![w.clone()], 0.1)?;
    /// let vars = vec![("head".to_string(), w.clone()), ("embed".to_string(), cut_off)];
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let report = opt.backward_step_report(&w.sqr()?.sum_all()?)?;
    /// assert_eq!(report.missing_grads(), ["embed"]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn missing_grads(&self) -> &[String] {
        &self.missing
    }

    /// How the inner optimizer got its gradients.
    #[must_use]
    pub fn path(&self) -> StepPath {
        self.known.path
    }

    /// The norm of all gradients, seen as one vector, before clipping: NaN if an element is NaN,
    /// else infinite if one is infinite. Under [`NonFinite::Zero`](crate::NonFinite::Zero) it is
    /// the norm of the finite elements.
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn total_norm(&self) -> Result<f64> {
        Ok(self.numbers()?.total_norm)
    }

    /// The factor of every gradient: `min(1, max_norm / (total_norm + eps))`. The smallest one if
    /// each Var or unit has its own; 1 for a value clip, 0 for a skipped step.
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn clip_coef(&self) -> Result<f64> {
        Ok(self.numbers()?.clip_coef)
    }

    /// Whether clipping changed anything.
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn was_clipped(&self) -> Result<bool> {
        Ok(self.numbers()?.was_clipped)
    }

    /// Whether the step was skipped; [`record`](Self::record) has the reason.
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn skipped(&self) -> Result<bool> {
        Ok(self.numbers()?.skipped)
    }

    /// The numbers; this may read them from a GPU.
    fn numbers(&self) -> Result<&StepRecord> {
        match &self.pending {
            Some(pending) => pending.record(),
            None => Ok(&self.known),
        }
    }

    fn named_norms(&self) -> Result<Vec<(String, f64)>> {
        let norms = match (&self.param_norms, &self.pending) {
            (Some(norms), _) => norms,
            (None, Some(pending)) => pending.param_norms(self.names.len())?.unwrap_or_default(),
            (None, None) => return Ok(Vec::new()),
        };
        let names = self.names.iter().cloned();
        Ok(names.zip(norms.iter().copied()).collect())
    }
}
