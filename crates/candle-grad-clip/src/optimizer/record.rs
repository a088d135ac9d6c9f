//! The record of one step, as plain data.

use candle_grad_clip_kernels::NormType;

use crate::clip::{Action, Decision, GroupRecord, NonFinite};
use crate::gradients::Measurements;
use crate::skip_reason::SkipReason;

/// How the inner optimizer got a step's gradients.
///
/// ```
#[doc = include_str!("../step_example.md")]
/// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
/// assert_eq!(opt.backward_step_report(&loss)?.path(), StepPath::InPlace);
/// assert_eq!(opt.step_report(&loss.backward()?)?.path(), StepPath::Copied);
/// assert_eq!(opt.backward_step_report(&(&loss * f64::NAN)?)?.path(), StepPath::Skipped);
/// opt.set_clip(Clip::norm(100.0))?;
/// assert_eq!(opt.backward_step_report(&loss)?.path(), StepPath::Unchanged);
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum StepPath {
    /// Unchanged: no gradient was written or copied.
    Unchanged,
    /// Edited in the store of `backward`; on CPU and CUDA in place.
    InPlace,
    /// Edited copies in the wrapper's buffer, since the store is the caller's.
    Copied,
    /// Unedited: a fused optimizer ([`optim`](crate::optim)) applies the edit in its update. If a
    /// GPU decides, [`StepReport::path`](crate::StepReport::path) returns this for skipped steps
    /// too, since it does not wait. [`StepReport::record`](crate::StepReport::record) has the final
    /// value.
    Fused,
    /// The inner optimizer was not called.
    Skipped,
}

/// A [`StepReport`](crate::StepReport) as plain data, for logs.
///
/// With the feature `serde` it is `Serialize` and `Deserialize`. JSON has no NaN and no infinity,
/// so such norms are the strings "NaN" and "inf" there.
///
/// ```
#[doc = include_str!("../step_example.md")]
/// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
/// let report = opt.backward_step_report(&loss)?;
/// let record = report.record()?;
/// assert_eq!((record.step, record.total_norm, record.was_clipped), (1, 5.0, true));
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct StepRecord {
    /// The step's number, from 1. Skipped steps count.
    pub step: u64,
    /// The type of the norms.
    pub norm_type: NormType,
    /// The norm of all gradients, seen as one vector, before clipping: NaN if an element is NaN,
    /// else infinite if one is infinite. Under [`NonFinite::Zero`](crate::NonFinite::Zero) it is
    /// the norm of the finite elements.
    #[cfg_attr(feature = "serde", serde(with = "crate::serde_float"))]
    pub total_norm: f64,
    /// The same norm after clipping; 0 for a skipped step.
    #[cfg_attr(feature = "serde", serde(with = "crate::serde_float"))]
    pub clipped_norm: f64,
    /// The factor of every gradient, or the smallest if each Var or unit has its own. Above 1 only
    /// by [`Clip::stabilizer`](crate::Clip::stabilizer) or a [`ClipRule`](crate::ClipRule). 1 for a
    /// value clip, 0 for a skipped step.
    #[cfg_attr(feature = "serde", serde(with = "crate::serde_float"))]
    pub clip_coef: f64,
    /// Whether clipping changed anything.
    pub was_clipped: bool,
    /// The number of elements that a value clip changed, or of units that
    /// [`Clip::agc`](crate::Clip::agc) changed. 0 for a norm clip, which changes all elements or
    /// none.
    pub num_clipped: u64,
    /// Whether the step was skipped.
    pub skipped: bool,
    /// Why the step was skipped.
    #[cfg_attr(feature = "serde", serde(default))]
    pub skip_reason: Option<SkipReason>,
    /// The number of NaN and infinite elements in all gradients before clipping.
    pub non_finite: u64,
    /// How the inner optimizer got its gradients.
    pub path: StepPath,
    /// The parameter groups, in their order.
    pub groups: Vec<GroupRecord>,
    /// The Vars without a gradient.
    pub missing_grads: Vec<String>,
    /// The norm of each Var's gradient before clipping, by name, in the order of the Vars; 0 for a
    /// Var without one. Empty unless requested.
    #[cfg_attr(feature = "serde", serde(with = "crate::serde_float::named"))]
    pub param_norms: Vec<(String, f64)>,
    /// The number of steps in a row, up to this one, with a [`clip_coef`](Self::clip_coef) below
    /// 1e-6: the model does not train then. The tenth causes a warning. Skipped steps and steps
    /// with norm 0 neither count nor end the row, nor do steps of
    /// [`Clip::stabilizer`](crate::Clip::stabilizer), which chooses lengths, not coefficients.
    #[cfg_attr(feature = "serde", serde(default))]
    pub tiny_coefs_in_a_row: u64,
}

impl StepRecord {
    /// The `k` largest of [`param_norms`](Self::param_norms): NaN first, then largest first.
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
    /// assert_eq!(report.record()?.largest_param_norms(1), [("b", 7.0)]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn largest_param_norms(&self, k: usize) -> Vec<(&str, f64)> {
        let norms = self.param_norms.iter();
        let mut norms: Vec<_> = norms.map(|(name, norm)| (name.as_str(), *norm)).collect();
        let key = |norm: f64| if norm.is_nan() { f64::INFINITY } else { norm };
        norms.sort_by(|a, b| {
            let nan_first = b.1.is_nan().cmp(&a.1.is_nan());
            nan_first.then(key(b.1).total_cmp(&key(a.1)))
        });
        norms.truncate(k);
        norms
    }

    /// Makes it the record of a skipped step.
    pub(super) fn skip(&mut self, reason: SkipReason) {
        self.skipped = true;
        self.skip_reason = Some(reason);
        self.path = StepPath::Skipped;
        (self.clip_coef, self.clipped_norm) = (0.0, 0.0);
        (self.was_clipped, self.num_clipped) = (false, 0);
        self.groups.clear();
    }

    /// What is known of a step that a GPU is still to decide.
    pub(crate) fn launched(step: u64, norm_type: NormType) -> Self {
        Self {
            step,
            norm_type,
            total_norm: f64::NAN,
            clipped_norm: f64::NAN,
            clip_coef: f64::NAN,
            was_clipped: false,
            num_clipped: 0,
            skipped: false,
            skip_reason: None,
            non_finite: 0,
            path: StepPath::Fused,
            groups: Vec::new(),
            missing_grads: Vec::new(),
            param_norms: Vec::new(),
            tiny_coefs_in_a_row: 0,
        }
    }

    /// The record of a decided step, without the fields that need names.
    pub(crate) fn new(
        step: u64,
        measured: &Measurements<'_>,
        decision: &Decision,
        non_finite: NonFinite,
        path: StepPath,
    ) -> Self {
        Self {
            step,
            norm_type: measured.norm_type,
            total_norm: match non_finite {
                NonFinite::Zero => measured.norm().value(),
                _ => measured.total_norm(),
            },
            clipped_norm: decision.clipped_norm,
            clip_coef: decision.clip_coef,
            was_clipped: decision.was_clipped,
            num_clipped: decision.num_clipped,
            skipped: matches!(decision.action, Action::Skip(_)),
            skip_reason: match decision.action {
                Action::Skip(reason) => Some(reason),
                Action::Keep | Action::Edit(_) => None,
            },
            non_finite: measured.total.stats.non_finite(),
            path: match decision.action {
                Action::Skip(_) => StepPath::Skipped,
                Action::Keep if path != StepPath::Fused => StepPath::Unchanged,
                Action::Keep | Action::Edit(_) => path,
            },
            groups: decision.groups.clone(),
            missing_grads: Vec::new(),
            param_norms: Vec::new(),
            tiny_coefs_in_a_row: 0,
        }
    }
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use super::{NormType, SkipReason, StepPath, StepRecord};

    #[test]
    fn a_record_survives_json() -> Result<(), serde_json::Error> {
        let record = StepRecord {
            step: 3,
            norm_type: NormType::P(1.5),
            total_norm: f64::INFINITY,
            clipped_norm: 0.25,
            clip_coef: 0.0,
            was_clipped: false,
            num_clipped: 0,
            skipped: true,
            skip_reason: Some(SkipReason::NonFinite),
            non_finite: 2,
            path: StepPath::Skipped,
            groups: Vec::new(),
            missing_grads: vec!["a".into()],
            param_norms: vec![("b".into(), f64::INFINITY), ("c".into(), 1.5)],
            tiny_coefs_in_a_row: 4,
        };
        let json = serde_json::to_string(&record)?;
        assert!(json.contains(r#""total_norm":"inf""#), "{json}");
        assert_eq!(serde_json::from_str::<StepRecord>(&json)?, record);
        let nan = json.replace("\"inf\"", "\"NaN\"");
        assert!(
            serde_json::from_str::<StepRecord>(&nan)?
                .total_norm
                .is_nan()
        );
        Ok(())
    }
}
