//! What a step measured and did, as its caller gets it.

use std::sync::Arc;

use super::pending::PendingStep;
use super::record::{StepPath, StepRecord};
use crate::clip::GroupRecord;
use crate::error::Result;
use crate::skip_reason::SkipReason;

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
/// assert!((report.clipped_norm()? - 1.0).abs() < 1e-6); // after
/// assert!((report.clip_coef()? - 0.2).abs() < 1e-6);
/// assert_eq!(report.missing(), ["var.1"]);
/// assert_eq!(report.path(), StepPath::InPlace);
/// let record = report.to_record()?; // plain data, for a log
/// assert_eq!(record.step, 1);
/// # Ok(())
/// # }
/// ```
///
/// [`ClippedOptimizer::step_report`]: crate::ClippedOptimizer::step_report
#[derive(Clone)]
pub struct StepReport {
    /// All of it; of a late step what is known without its numbers.
    pub(crate) record: StepRecord,
    /// The numbers of a step that a GPU has decided.
    pub(crate) late: Option<Arc<PendingStep>>,
    pub(crate) missing: Arc<[String]>,
    /// Of all Vars, in their order.
    pub(crate) names: Arc<[String]>,
    pub(crate) param_norms: Option<Arc<[f64]>>,
}

/// Shows [`StepReport::to_record`].
impl std::fmt::Debug for StepReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("StepReport")
            .field(&self.to_record())
            .finish()
    }
}

impl StepReport {
    /// The numbers, which may have to be read from a GPU.
    fn record(&self) -> Result<&StepRecord> {
        match &self.late {
            Some(late) => late.record(),
            None => Ok(&self.record),
        }
    }

    /// The step's number, from 1; skipped steps count.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// assert_eq!(opt.backward_step_report(&loss)?.step(), 1);
    /// assert_eq!(opt.backward_step_report(&loss)?.step(), 2);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn step(&self) -> u64 {
        self.record.step
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
    /// assert_eq!(report.missing(), ["embed"]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// The groups of Vars, if there are some (see [`ParamGroups`](crate::optim::ParamGroups)), in their order: the norm of
    /// each, and what it was multiplied by. Empty for a skipped step.
    #[must_use]
    pub fn groups(&self) -> &[GroupRecord] {
        &self.record.groups
    }

    /// How the inner optimizer got its gradients.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(100.0))?;
    /// let report = opt.backward_step_report(&loss)?; // norm 5, limit 100
    /// assert_eq!(report.path(), StepPath::Unchanged);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn path(&self) -> StepPath {
        self.record.path
    }

    /// Norm of all gradients as one vector before clipping; NaN or infinite if an element is, but of
    /// the finite elements under [`NonFinite::Zero`](crate::NonFinite::Zero).
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let report = opt.backward_step_report(&loss)?; // gradient (3, 4), limit 1
    /// assert_eq!(report.total_norm()?, 5.0);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    pub fn total_norm(&self) -> Result<f64> {
        Ok(self.record()?.total_norm)
    }

    /// Norm of all gradients as one vector after clipping; 0 for a skipped step. Computed from the
    /// norm before, so without the rounding of the clipped elements.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let report = opt.backward_step_report(&loss)?; // gradient (3, 4), limit 1
    /// assert!((report.clipped_norm()? - 1.0).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    pub fn clipped_norm(&self) -> Result<f64> {
        Ok(self.record()?.clipped_norm)
    }

    /// What every gradient was multiplied by: `min(1, max_norm / (total_norm + eps))`. The
    /// smallest where each Var or unit has its own, 1 for a value clip, 0 for a skipped step.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let report = opt.backward_step_report(&loss)?; // gradient (3, 4), limit 1
    /// assert_eq!(report.clip_coef()?, 1.0 / (5.0 + 1e-6));
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    pub fn clip_coef(&self) -> Result<f64> {
        Ok(self.record()?.clip_coef)
    }

    /// How many steps in a row, up to this one, had a [`clip_coef`](Self::clip_coef) below 1e-6: a model that stands still. At the
    /// tenth there is a warning. Skipped steps, and those of norm 0, neither count nor end the row. 0 for a step that a GPU decides,
    /// where only the warning tells.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1e-7))?;
    /// opt.backward_step(&loss)?; // norm 5
    /// assert_eq!(opt.backward_step_report(&loss)?.tiny_coefs_in_a_row(), 2);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn tiny_coefs_in_a_row(&self) -> u64 {
        self.record.tiny_coefs_in_a_row
    }

    /// Whether clipping changed anything.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// assert!(opt.backward_step_report(&loss)?.was_clipped()?); // norm 5, limit 1
    /// assert!(!opt.backward_step_report(&(loss * 0.1)?)?.was_clipped()?);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    pub fn was_clipped(&self) -> Result<bool> {
        Ok(self.record()?.was_clipped)
    }

    /// How many elements a value clip changed; how many units, for [`Clip::agc`](crate::Clip::agc).
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::value(3.5))?;
    /// let report = opt.backward_step_report(&loss)?; // gradient (3, 4)
    /// assert_eq!(report.num_clipped()?, 1);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    pub fn num_clipped(&self) -> Result<u64> {
        Ok(self.record()?.num_clipped)
    }

    /// Whether the step was skipped: see [`StepReport::skip_reason`].
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let report = opt.backward_step_report(&(loss * f64::NAN)?)?;
    /// assert!(report.skipped()?);
    /// assert_eq!(w.to_vec1::<f64>()?, [3.0, 4.0]); // as it was
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    pub fn skipped(&self) -> Result<bool> {
        Ok(self.record()?.skipped)
    }

    /// Why the step was skipped, if it was: gradients that are not finite, or a norm or loss that was too large for the rule.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::skip_norm(1.0))?;
    /// let report = opt.backward_step_report(&loss)?; // norm 5
    /// assert_eq!(report.skip_reason()?, Some(candle_grad_clip::SkipReason::LargeNorm));
    /// assert_eq!(report.non_finite()?, 0);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    pub fn skip_reason(&self) -> Result<Option<SkipReason>> {
        Ok(self.record()?.skip_reason)
    }

    /// How many elements were NaN or infinite, as the gradients came.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let report = opt.backward_step_report(&(loss * f64::INFINITY)?)?;
    /// assert_eq!(report.non_finite()?, 2);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    pub fn non_finite(&self) -> Result<u64> {
        Ok(self.record()?.non_finite)
    }

    /// The norm of each Var's gradient before clipping, by name, in the order of the Vars: empty
    /// unless asked for by [`ClippedOptimizer::with_param_norms`]. 0 for Vars without a gradient.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?.with_param_norms(true);
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert_eq!(report.param_norms()?, [("var.0", 5.0)]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    ///
    /// [`ClippedOptimizer::with_param_norms`]: crate::ClippedOptimizer::with_param_norms
    pub fn param_norms(&self) -> Result<Vec<(&str, f64)>> {
        let norms = match (&self.param_norms, &self.late) {
            (Some(norms), _) => norms,
            (None, Some(late)) => late.param_norms(self.names.len())?.unwrap_or_default(),
            (None, None) => return Ok(Vec::new()),
        };
        Ok(self
            .names
            .iter()
            .map(String::as_str)
            .zip(norms.iter().copied())
            .collect())
    }

    /// The `k` largest of [`StepReport::param_norms`], largest first, NaN before all.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer};
    /// # use candle_nn::{Optimizer, SGD};
    /// # let (a, b) = (Var::new(0f64, &Device::Cpu)?, Var::new(0f64, &Device::Cpu)?);
    /// # let sgd = SGD::new(vec![a.clone(), b.clone()], 0.1)?;
    /// # let vars = vec![("a".to_string(), a.clone()), ("b".to_string(), b.clone())];
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?.with_param_norms(true);
    /// let report = opt.backward_step_report(&((a.as_tensor() * 2.0)? + (b.as_tensor() * 7.0)?)?)?;
    /// assert_eq!(report.largest_param_norms(1)?, [("b", 7.0)]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    pub fn largest_param_norms(&self, k: usize) -> Result<Vec<(&str, f64)>> {
        let mut norms = self.param_norms()?;
        let key = |norm: f64| if norm.is_nan() { f64::INFINITY } else { norm };
        norms.sort_by(|a, b| {
            b.1.is_nan()
                .cmp(&a.1.is_nan())
                .then(key(b.1).total_cmp(&key(a.1)))
        });
        norms.truncate(k);
        Ok(norms)
    }

    /// All of it as plain data.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let record = opt.backward_step_report(&loss)?.to_record()?;
    /// println!("{},{},{}", record.step, record.total_norm, record.clipped_norm); // a line of CSV
    /// assert!(record.missing.is_empty());
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If it has to be read from a GPU, and that fails.
    pub fn to_record(&self) -> Result<StepRecord> {
        let param_norms = self
            .param_norms()?
            .into_iter()
            .map(|(name, norm)| (name.into(), norm));
        Ok(StepRecord {
            missing: self.missing.to_vec(),
            param_norms: param_norms.collect(),
            ..self.record()?.clone()
        })
    }
}
