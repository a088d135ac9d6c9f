//! decide: from measurements to what is to be done. One method a file, pure arithmetic.

mod adagc;
mod agc;
mod auto;
mod block_rms;
mod edits;
mod groups;
mod history;
mod limit;
mod list;
mod non_finite;
mod norm;
mod own;
mod param_norm;
mod per_var;
mod quantile;
pub(crate) mod record;
mod rule;
mod set_aside;
mod skip;
mod state;
mod text;
mod value;
mod zclip;

use std::sync::Arc;

use candle_grad_clip_kernels::{Edit, NormType};

pub use adagc::AdaGc;
pub use agc::{Agc, AgcUnits};
pub use auto::AutoClip;
pub(crate) use edits::Edits;
pub use groups::GroupRecord;
pub(crate) use groups::Limits;
pub(crate) use history::TINY_COEF;
pub use non_finite::NonFinite;
pub(crate) use norm::clip_coef;
pub(crate) use own::Own;
pub use own::{ClipDecision, ClipRule, Measured};
pub use quantile::QuantileClip;
pub use skip::SkipSteps;
pub(crate) use state::{Observed, RuleState};
pub use zclip::{ZClip, ZClipMode};

use rule::{Method, Rule};

use crate::check::check_norm_type;
use crate::error::{Error, Result};
use crate::gradients::{Measurements, Plan, Request, UnitPlan};
use crate::skip_reason::SkipReason;
use crate::vars::NamedVars;

/// What to do to the gradients of a step: plain data, checked by whatever takes it.
///
/// | | |
/// |---|---|
/// | [`Clip::none`] | measure and report only |
/// | [`Clip::norm`] | `g * min(1, max_norm / (total_norm + eps))`, one coefficient for all Vars |
/// | [`Clip::value`] | every element into `[-clip_value, clip_value]` |
/// | [`Clip::param_norm`] | `g_i * min(1, max_norm / (param_norm_i + eps))`, a coefficient for each Var |
/// | [`Clip::block_rms`] | `g_i * min(1, max_rms / rms_i)`, a coefficient for each Var |
/// | [`Clip::auto`] | AutoClip: as `norm`, to a percentile of the norms so far |
/// | [`Clip::quantile`] | as `norm`, to a quantile of the norms that one number follows |
/// | [`Clip::zclip`] | ZClip: spikes, by their z-score; and as `norm` |
/// | [`Clip::adagc`] | AdaGC: each Var to a little above its own mean norm |
/// | [`Clip::agc`] | AGC: each unit to a share of its weights' norm |
/// | [`Clip::skip_norm`], [`Clip::skip_zscore`] | no step where the norm is too large |
/// | [`Clip::all`] | several of these, one after the other |
///
/// What a method remembers of the training is kept by the [`ClippedOptimizer`](crate::ClippedOptimizer), which saves it in its
/// checkpoints; a norm that is 0 or not finite, or of a step that was skipped or failed, never enters it. A limit that a method
/// chooses is never 0.
///
/// As text ([`Clip::from_str`](#impl-FromStr-for-Clip), and with the feature `serde` as a string):
///
/// ```
/// use candle_grad_clip::{Clip, NonFinite};
///
/// let clip = Clip::norm(1.0).non_finite(NonFinite::Error);
/// assert_eq!(clip.to_string(), "norm:1,non_finite=error");
/// assert_eq!(clip, "norm:1,non_finite=error".parse()?);
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "String", into = "String"))]
pub struct Clip {
    /// One, or more that come one after the other.
    rules: Vec<Rule>,
    norm_type: NormType,
    pub(crate) non_finite: NonFinite,
    pub(crate) max_skips: u32,
}

/// `eps` of `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15).
pub(crate) const CLIP_EPS: f64 = 1e-6;

impl Clip {
    fn new(method: Method) -> Self {
        let eps = method.default_eps();
        Self {
            rules: vec![Rule { method, eps }],
            norm_type: NormType::L2,
            non_finite: NonFinite::SkipStep,
            max_skips: 10,
        }
    }

    /// Measures and reports, and changes no gradient.
    ///
    /// The policy for gradients that are not finite holds here as well: a step with a NaN is skipped
    /// unless [`Clip::non_finite`] says otherwise. That policy looks at the gradients, not at the update: finite gradients near
    /// the dtype's largest number can make weights NaN or infinite, and nothing limits them here.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::none())?;
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert_eq!((report.total_norm()?, report.clipped_norm()?), (5.0, 5.0));
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn none() -> Self {
        Self::new(Method::None)
    }

    /// Clips the global norm to `max_norm`: above zero, or infinite to measure only.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(2.5))?;
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert!((report.clipped_norm()? - 2.5).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn norm(max_norm: f64) -> Self {
        Self::new(Method::Norm { max_norm })
    }

    /// Clips every element to `[-clip_value, clip_value]`, which turns the gradient's direction.
    /// `clip_value` is above zero, or infinite to measure only.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::value(3.5))?;
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert_eq!(report.num_clipped()?, 1);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn value(clip_value: f64) -> Self {
        Self::new(Method::Value { clip_value })
    }

    /// Clips the norm of each Var's gradient to `max_norm`, each by itself: above zero, or infinite to measure only.
    ///
    /// `g_i * min(1, max_norm / (param_norm_i + eps))`. The update's direction turns where some Vars are clipped and
    /// others are not. [`StepReport::clip_coef`](crate::StepReport::clip_coef) is the smallest of the coefficients.
    ///
    /// # References
    /// Keras' `clipnorm`, burn's `GradientClippingConfig::Norm`; PyTorch's `clip_grad_norm_` called for each parameter.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::param_norm(2.5))?;
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert!((report.clip_coef()? - 0.5).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn param_norm(max_norm: f64) -> Self {
        Self::new(Method::ParamNorm { max_norm })
    }

    /// Clips the root mean square of each Var's gradient to `max_rms`, each by itself: above zero, or infinite to
    /// measure only.
    ///
    /// `g_i * min(1, max_rms / (rms_i + eps))` with `rms_i = sqrt(mean(g_i^2))`, and an `eps` of 0 unless
    /// [`Clip::eps`] says otherwise. With another [`Clip::norm_type`] it is that power's mean.
    ///
    /// # References
    /// `optax.clip_by_block_rms` (optax 0.2.8).
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::block_rms(1.0))?;
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert!((report.clipped_norm()? - 2f64.sqrt()).abs() < 1e-12); // two elements of rms 1
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn block_rms(max_rms: f64) -> Self {
        Self::new(Method::BlockRms { max_rms })
    }

    /// AutoClip: clips the global norm to a percentile (0 to 100) of the norms so far; the paper's is 10.
    ///
    /// See [`AutoClip`] for the equation, and for a history of bounded length.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::auto(50.0))?;
    /// opt.backward_step(&loss)?; // norm 5, the first: w becomes 0.9 (3, 4)
    /// let report = opt.backward_step_report(&(loss * 3.0)?)?; // norm 13.5
    /// assert!((report.clipped_norm()? - 9.25).abs() < 1e-5); // the median of 5 and 13.5
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # References
    /// Seetharaman and others (2020), arXiv 2007.14469.
    #[must_use]
    pub fn auto(percentile: f64) -> Self {
        AutoClip {
            percentile,
            window: None,
        }
        .into()
    }

    /// Clips the global norm to a limit that a share of the norms stays below, followed by one number.
    ///
    /// See [`QuantileClip`] for the equation and its rate.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::quantile(0.5))?;
    /// opt.backward_step(&loss)?; // norm 5: the limit becomes 5 exp(-0.1)
    /// let report = opt.backward_step_report(&(loss * 2.0)?)?;
    /// assert!((report.clipped_norm()? - 5.0 * (-0.1f64).exp()).abs() < 1e-5);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # References
    /// Andrew and others (2021), arXiv 1905.03871.
    #[must_use]
    pub fn quantile(target: f64) -> Self {
        QuantileClip {
            target,
            ..QuantileClip::default()
        }
        .into()
    }

    /// ZClip with the defaults of its authors: clips norms far above the mean of those before, and all to 1.
    ///
    /// See [`ZClip`] for the equations and options.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::zclip())?;
    /// let report = opt.backward_step_report(&loss)?; // a step of the warm-up
    /// assert!((report.clipped_norm()? - 1.0).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # References
    /// Kumar and others (2025), arXiv 2504.02507.
    #[must_use]
    pub fn zclip() -> Self {
        ZClip::default().into()
    }

    /// AdaGC with the defaults of its paper: clips each Var's norm to 1.05 of its own running mean.
    ///
    /// See [`AdaGc`] for the equations and options.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::adagc())?;
    /// let report = opt.backward_step_report(&loss)?; // a step of the warm-up
    /// assert!((report.clipped_norm()? - 1.0).abs() < 1e-12);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # References
    /// Wang and others (2025), arXiv 2502.11034.
    #[must_use]
    pub fn adagc() -> Self {
        AdaGc::default().into()
    }

    /// AGC with the defaults of its paper: clips each unit (a row) of each Var to 0.01 of the norm of its weights.
    ///
    /// See [`Agc`] for the equation, for other units, and for Vars to leave out.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::agc())?;
    /// let report = opt.backward_step_report(&loss)?; // gradient and weights are (3, 4), one unit
    /// assert!((report.clipped_norm()? - 0.05).abs() < 1e-12);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # References
    /// Brock and others (2021), arXiv 2102.06171.
    #[must_use]
    pub fn agc() -> Self {
        Agc::default().into()
    }

    /// Takes no step whose norm is above `norm`, and changes no gradient of the others.
    ///
    /// See [`SkipSteps`] for a limit to clip to as well.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::skip_norm(4.0))?;
    /// assert!(opt.backward_step_report(&loss)?.skipped()?); // norm 5
    /// assert_eq!(w.to_vec1::<f64>()?, [3.0, 4.0]); // as it was
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # References
    /// Megatron-LM, which skips a step whose norm is above a fixed limit.
    #[must_use]
    pub fn skip_norm(norm: f64) -> Self {
        SkipSteps {
            norm,
            ..SkipSteps::default()
        }
        .into()
    }

    /// Takes no step whose norm is more than `z` standard deviations above the mean of the 128 before.
    ///
    /// See [`SkipSteps`] for the equation and other windows.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::skip_zscore(6.0))?;
    /// let loss_of_norm = |norm: f64| (w.narrow(0, 0, 1)? * norm)?.sum_all();
    /// for step in 0..64 {
    ///     opt.backward_step(&loss_of_norm(1.0 + f64::from(step % 2))?)?; // norms 1 and 2
    /// }
    /// assert!(opt.backward_step_report(&loss_of_norm(10.0)?)?.skipped()?);
    /// assert!(!opt.backward_step_report(&loss_of_norm(2.0)?)?.skipped()?);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # References
    /// OLMo-core's `SkipStepOptimizer`: z 6.
    #[must_use]
    pub fn skip_zscore(z: f64) -> Self {
        SkipSteps {
            z,
            ..SkipSteps::default()
        }
        .into()
    }

    /// The norm that [`Clip::norm`] limits and that reports show. Default: L2.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let clip = Clip::norm(2.0).norm_type(NormType::Inf);
    /// let report = ClippedOptimizer::wrap(sgd, vars, clip)?.backward_step_report(&loss)?;
    /// assert_eq!(report.total_norm()?, 4.0); // of (3, 4)
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn norm_type(mut self, norm_type: NormType) -> Self {
        self.norm_type = norm_type;
        self
    }

    /// What [`Clip::norm`] adds to the norm before it divides by it. Default: 1e-6, as in PyTorch. (For [`Clip::agc`] the least norm of
    /// weights, [`Agc::eps`].) Of several clips it is set for all; each can have its own before they go into [`Clip::all`].
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let clip = Clip::norm(1.0).eps(0.0); // as in TensorFlow
    /// let report = ClippedOptimizer::wrap(sgd, vars, clip)?.backward_step_report(&loss)?;
    /// assert_eq!(report.clip_coef()?, 0.2); // 1 / 5
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn eps(mut self, eps: f64) -> Self {
        for rule in &mut self.rules {
            rule.eps = eps;
        }
        self
    }

    /// What to do when gradients are NaN or infinite. Default: [`NonFinite::SkipStep`].
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let clip = Clip::norm(1.0).non_finite(NonFinite::Error);
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, clip)?;
    /// assert!(opt.backward_step_report(&(loss * f64::INFINITY)?).is_err());
    /// assert!(opt.last_report().is_none()); // no step was taken
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn non_finite(mut self, non_finite: NonFinite) -> Self {
        self.non_finite = non_finite;
        self
    }

    /// How many steps in a row may be skipped; one more is an error. Default: 10.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0).max_skips(1))?;
    /// let bad = (loss * f64::NAN)?;
    /// assert!(opt.backward_step_report(&bad)?.skipped()?);
    /// assert!(opt.backward_step_report(&bad).is_err()); // the second in a row
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn max_skips(mut self, max_skips: u32) -> Self {
        self.max_skips = max_skips;
        self
    }

    /// Checks every field.
    pub(crate) fn check(&self) -> Result<()> {
        check_norm_type(self.norm_type)?;
        self.rules.iter().try_for_each(Rule::check)?;
        list::check(self)
    }

    /// Whether nothing is to be done but what the policies say.
    pub(crate) fn is_none(&self) -> bool {
        self.rules.iter().all(|rule| rule.method == Method::None)
    }

    pub(crate) fn request(&self) -> Request {
        let clip_value = self.rules.iter().find_map(|rule| match rule.method {
            Method::Value { clip_value } => Some(clip_value),
            _ => None,
        });
        Request {
            norm_type: self.norm_type,
            clip_value,
            zero_non_finite: self.non_finite == NonFinite::Zero,
        }
    }

    /// This clip as a GPU can decide it by itself, if it can: without a history, and without an error to return at once.
    pub(crate) fn plan(&self) -> Option<Plan> {
        let [rule] = &self.rules[..] else {
            return None;
        };
        let max_norm = match rule.method {
            Method::Norm { max_norm } => max_norm,
            Method::None | Method::Value { .. } => f64::INFINITY,
            _ => return None,
        };
        (self.non_finite != NonFinite::Error).then(|| Plan {
            request: self.request(),
            max_norm,
            eps: rule.eps,
            skip_non_finite: self.non_finite == NonFinite::SkipStep,
        })
    }

    /// Whether a rule looks at the loss.
    pub(crate) fn reads_loss(&self) -> bool {
        let reads =
            |rule: &Rule| matches!(&rule.method, Method::Skip(rule) if rule.loss_z < f64::INFINITY);
        self.rules.iter().any(reads)
    }

    /// The units of `vars`, if the clip has a rule for them.
    pub(crate) fn unit_plan(&self, vars: &NamedVars) -> Result<Option<Arc<UnitPlan>>> {
        let plan = self.rules.iter().find_map(|rule| match &rule.method {
            Method::Agc(rule) => Some(rule.plan(vars)),
            _ => None,
        });
        plan.transpose()
    }

    /// Whether groups may have limits of their own.
    pub(crate) fn check_groups(&self, has_limits: bool) -> Result<()> {
        let fault = |rule: &Rule| match &rule.method {
            Method::Value { clip_value } => Some(("clip_value", *clip_value)),
            Method::Agc(rule) => Some(("clipping", rule.clipping)),
            _ => None,
        };
        match self.rules.iter().find_map(fault) {
            Some((name, value)) if has_limits => Err(Error::InvalidOption {
                name,
                value,
                expected: "Clip::norm, Clip::none or another that scales whole Vars together with groups that have a max_norm",
            }),
            _ => Ok(()),
        }
    }

    /// What is to be done with gradients that measured so, of Vars in groups.
    ///
    /// `state` is the history that earlier steps left. What this step adds to it is in
    /// [`Decision::observed`], and enters it only when the step has been taken. `own` is what a rule of the user's decided, in place of
    /// this clip's.
    pub(crate) fn decide(
        &self,
        state: &RuleState,
        measured: &Measurements<'_>,
        limits: &Limits,
        own: Option<Own>,
    ) -> Decision {
        let bad = measured.total.stats.non_finite() > 0;
        let zero_non_finite = match self.non_finite {
            NonFinite::Error | NonFinite::SkipStep if bad => {
                return Decision::refuse(SkipReason::NonFinite);
            }
            NonFinite::Zero => bad,
            NonFinite::Error | NonFinite::SkipStep | NonFinite::Propagate => false,
        };
        let decision = match (own, &self.rules[..]) {
            (Some(own), _) => own.decide(measured, zero_non_finite),
            (None, [rule]) => rule.decide(state, measured, zero_non_finite),
            (None, rules) => list::decide(rules, state, measured, zero_non_finite),
        };
        if limits.is_empty() || matches!(decision.action, Action::Refuse(_)) {
            return decision;
        }
        // Of several, the groups' limits come with that of the last.
        let eps = self.rules.last().map_or(CLIP_EPS, |rule| rule.eps);
        groups::decide(measured, decision, limits, eps, zero_non_finite)
    }
}

/// What is to be done, and what the gradients will be afterwards.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Decision {
    pub(crate) action: Action,
    pub(crate) clip_coef: f64,
    pub(crate) clipped_norm: f64,
    pub(crate) was_clipped: bool,
    pub(crate) num_clipped: u64,
    /// What holds in each group, if there are groups.
    pub(crate) groups: Vec<GroupRecord>,
    /// What the rule's history gets if the step is taken.
    pub(crate) observed: Observed,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// Nothing is changed and nothing copied.
    Leave,
    Edit(Edits),
    /// No step is taken with these gradients.
    Refuse(SkipReason),
}

impl Decision {
    pub(crate) fn refuse(reason: SkipReason) -> Self {
        Self {
            action: Action::Refuse(reason),
            clip_coef: 0.0,
            clipped_norm: 0.0,
            was_clipped: false,
            num_clipped: 0,
            groups: Vec::new(),
            observed: Observed::Nothing,
        }
    }

    /// For gradients that are still multiplied by `scale`.
    pub(crate) fn of_scaled(mut self, scale: f64) -> Self {
        if scale != 1.0 {
            self.action = match self.action {
                Action::Refuse(reason) => Action::Refuse(reason),
                Action::Leave => Action::Edit(Edits::All(Edit::NOTHING.of_scaled(scale))),
                Action::Edit(edits) => Action::Edit(edits.of_scaled(scale)),
            };
        }
        self
    }

    /// One coefficient for all; exactly 1 with nothing to clean leaves everything alone.
    fn scale(measured: &Measurements<'_>, clip_coef: f64, zero_non_finite: bool) -> Self {
        let action = if clip_coef == 1.0 && !zero_non_finite {
            Action::Leave
        } else {
            Action::Edit(Edits::All(Edit::Scale {
                clip_coef,
                zero_non_finite,
            }))
        };
        let clipped_norm = if zero_non_finite || measured.total.stats.non_finite() == 0 {
            measured.norm().scaled(clip_coef)
        } else {
            measured.total_norm() * clip_coef
        };
        Self {
            action,
            clip_coef,
            clipped_norm,
            was_clipped: clip_coef != 1.0,
            num_clipped: 0,
            groups: Vec::new(),
            observed: Observed::Nothing,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{Device, Tensor};
    use candle_grad_clip_kernels::{NormType, measure};

    use crate::backend::Place;
    use crate::measure::{Entry, GradStats, Measurements};

    /// Gradients that have been measured.
    pub(super) struct Measured(Vec<(Tensor, Vec<f64>)>);

    pub(super) fn measured(gradients: &[&[f64]]) -> Measured {
        let one = |values: &&[f64]| {
            let tensor = Tensor::new(*values, &Device::Cpu).unwrap();
            (tensor, values.to_vec())
        };
        Measured(gradients.iter().map(one).collect())
    }

    impl Measured {
        pub(super) fn of(&self) -> Measurements<'_> {
            let norm_type = NormType::L2;
            let mut total = GradStats::ZERO;
            let mut entries = Vec::new();
            for (tensor, values) in &self.0 {
                let stats = measure(values, norm_type);
                total.stats = total.stats.merge(stats, norm_type);
                entries.push(Entry {
                    grad: Some(tensor),
                    place: Place::Cpu,
                    elements: values.len(),
                    storage: 0,
                    measured: GradStats {
                        stats,
                        ..GradStats::ZERO
                    },
                });
            }
            Measurements {
                entries,
                total,
                norm_type,
                units: None,
                loss: None,
            }
        }
    }
}
