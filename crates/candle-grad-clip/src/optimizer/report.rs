//! What a step measured and did, as its caller gets it.

use std::sync::{Arc, OnceLock};

use super::pending::PendingStep;
use super::record::{StepPath, StepRecord};
use crate::error::Result;

/// What one step measured and did: of [`ClippedOptimizer::step_report`] and `last_report`.
///
/// Cheap to clone. Every step owns its result, so a report that is kept does not change. Where the
/// gradients are on a GPU, the numbers may still be there too: reading them may wait for it, hence
/// the `Result`s.
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
    /// What is known without names; of a step that a GPU decides, without its numbers.
    pub(super) known: StepRecord,
    /// The numbers of a step that a GPU decides.
    pub(super) pending: Option<Arc<PendingStep>>,
    pub(super) missing: Arc<[String]>,
    /// Of all Vars, in their order.
    pub(super) names: Arc<[String]>,
    pub(super) param_norms: Option<Arc<[f64]>>,
    /// All of it, once somebody has asked.
    pub(super) record: OnceLock<Arc<StepRecord>>,
}

/// Shows [`StepReport::record`], or the step's number where that would wait for a GPU.
impl std::fmt::Debug for StepReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_tuple("StepReport");
        match &self.pending {
            Some(pending) if !pending.is_ready() => shown.field(&self.known.step).finish(),
            _ => shown.field(&self.record()).finish(),
        }
    }
}

impl StepReport {
    /// All that the step measured and did, as plain data.
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
    /// The numbers are on a GPU, and reading them fails.
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

    /// The step's number, from 1; skipped steps count.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.known.step
    }

    /// Names of the Vars that got no gradient, but for those that were expected to get none.
    ///
    /// Such a Var is not trained. The usual reason is an operation without a backward pass in front
    /// of it: `LayerNorm::forward`, `RmsNorm::forward`, `softmax_last_dim` and `rope` of candle-nn
    /// cut the graph without an error (candle issues 3011 and 3569).
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

    /// Norm of all gradients as one vector before clipping; NaN or infinite if an element is, but
    /// of the finite elements under [`NonFinite::Zero`](crate::NonFinite::Zero).
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn total_norm(&self) -> Result<f64> {
        Ok(self.numbers()?.total_norm)
    }

    /// What every gradient was multiplied by: `min(1, max_norm / (total_norm + eps))`. The
    /// smallest where each Var or unit has its own, 1 for a value clip, 0 for a skipped step.
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

    /// Whether the step was skipped: the reason is in [`record`](Self::record).
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn skipped(&self) -> Result<bool> {
        Ok(self.numbers()?.skipped)
    }

    /// The numbers, which may have to be read from a GPU.
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
