//! User-defined rules.

use std::sync::Arc;

use candle_grad_clip_kernels::NormType;

use super::decision::{Decision, Given};
use super::non_finite::NonFinite;
use super::rule::{Asked, Rule, Saved};
use super::{per_var, value};
use crate::check::check_limit;
use crate::error::{Error, Result};
use crate::skip_reason::SkipReason;

/// A user-defined clipping rule, for
/// [`ClippedOptimizer::with_rule`](crate::ClippedOptimizer::with_rule). It decides from the norms
/// what to do with the gradients. The wrapper measures, applies the decision, skips and reports.
///
/// This rule limits the norm to twice its running mean:
///
/// ```
/// use candle_grad_clip::{ClipDecision, ClipRule, GradNorms};
/// # use candle_core::{Device, Var};
/// # use candle_grad_clip::{Clip, ClippedOptimizer};
/// # use candle_nn::{Optimizer, SGD};
///
/// #[derive(Default)]
/// struct TwiceTheMean {
///     mean: Option<f64>,
/// }
///
/// impl ClipRule for TwiceTheMean {
///     fn decide(&self, measured: &GradNorms) -> ClipDecision {
///         match self.mean {
///             Some(mean) if measured.total_norm() > 2.0 * mean => {
///                 ClipDecision::Scale(2.0 * mean / measured.total_norm())
///             }
///             _ => ClipDecision::Keep,
///         }
///     }
///
///     fn observe(&mut self, measured: &GradNorms, _: &ClipDecision) {
///         let mean = self.mean.unwrap_or(measured.total_norm());
///         self.mean = Some(0.9 * mean + 0.1 * measured.total_norm());
///     }
///
///     fn save(&self) -> Vec<f64> {
///         self.mean.into_iter().collect()
///     }
///
///     fn load(&mut self, state: &[f64]) -> Result<(), String> {
///         self.mean = state.first().copied();
///         Ok(())
///     }
/// }
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// # let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
/// # let sgd = SGD::new(vec![w.clone()], 0.0)?;
/// let opt = ClippedOptimizer::wrap(sgd, vec![w.clone()], Clip::none())?;
/// let mut opt = opt.with_rule(TwiceTheMean::default())?;
/// let loss = (w.sqr()?.sum_all()? / 2.0)?; // the gradient is (3, 4)
/// assert!(!opt.backward_step_report(&loss)?.was_clipped()?);
/// assert_eq!(opt.backward_step_report(&(loss * 4.0)?)?.clip_coef()?, 0.5); // norm 20, mean 5
/// # Ok(())
/// # }
/// ```
pub trait ClipRule: Send + Sync {
    /// Decides what to do with gradients of these norms. Not called if [`NonFinite`] has already
    /// stopped the step.
    fn decide(&self, measured: &GradNorms) -> ClipDecision;

    /// Called after a step was taken as decided. Not called for a skipped or failed step, or for a
    /// non-finite norm.
    fn observe(&mut self, measured: &GradNorms, decision: &ClipDecision) {
        let _ = (measured, decision);
    }

    /// Whether the rule needs [`GradNorms::loss`]. Each `backward_step` then reads the loss from
    /// the device.
    fn reads_loss(&self) -> bool {
        false
    }

    /// The state to save in checkpoints: finite numbers.
    fn save(&self) -> Vec<f64> {
        Vec::new()
    }

    /// Restores the state that [`save`](Self::save) returned. Not called if it was empty.
    ///
    /// # Errors
    /// What is wrong with the numbers. The rule must then be unchanged.
    fn load(&mut self, state: &[f64]) -> std::result::Result<(), String> {
        Err(format!(
            "expected a rule without state, got {} numbers",
            state.len()
        ))
    }
}

/// The measured norms, for a [`ClipRule`].
#[derive(Debug, Clone, PartialEq)]
pub struct GradNorms {
    step: u64,
    norm_type: NormType,
    total_norm: f64,
    param_norms: Vec<f64>,
    names: Arc<[String]>,
    loss: Option<f64>,
}

impl GradNorms {
    /// Under [`NonFinite::Zero`] the norms are those of the finite elements.
    fn new(asked: &Asked<'_>) -> Self {
        let measured = asked.measured;
        let norm_type = measured.norm_type;
        let of_finite = measured.entries.iter();
        let of_finite = of_finite.map(|entry| entry.measured.stats.power.root(norm_type).value());
        let (total_norm, param_norms) = match asked.non_finite {
            NonFinite::Zero => (measured.norm().value(), of_finite.collect()),
            _ => (measured.total_norm(), measured.param_norms()),
        };
        Self {
            step: asked.step,
            norm_type,
            total_norm,
            param_norms,
            names: asked.names.clone(),
            loss: measured.loss,
        }
    }

    /// The step's number, counted from 1, skipped steps included.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The type of the norms: [`Clip::norm_type`](crate::Clip::norm_type).
    #[must_use]
    pub fn norm_type(&self) -> NormType {
        self.norm_type
    }

    /// Norm of all gradients as one vector. Finite, except under [`NonFinite::Propagate`].
    #[must_use]
    pub fn total_norm(&self) -> f64 {
        self.total_norm
    }

    /// Norm of each Var's gradient, in the order of [`names`](Self::names); 0 for those without
    /// one.
    #[must_use]
    pub fn param_norms(&self) -> &[f64] {
        &self.param_norms
    }

    /// The Vars' names.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The loss, if [`ClipRule::reads_loss`] is true and the step has the loss: from
    /// `backward_step` or
    /// [`step_report_with_loss`](crate::ClippedOptimizer::step_report_with_loss).
    #[must_use]
    pub fn loss(&self) -> Option<f64> {
        self.loss
    }
}

/// The decision of a [`ClipRule`]. A coefficient must be finite and 0 or above. A bound must be
/// above 0. Otherwise the step is an error, and nothing is changed.
#[derive(Debug, Clone, PartialEq)]
pub enum ClipDecision {
    /// Takes the step with the gradients as they are.
    Keep,
    /// Multiplies all gradients by this. It may be above 1.
    Scale(f64),
    /// Multiplies each Var's gradient by its own coefficient: one for each of [`GradNorms::names`].
    ScaleEach(Vec<f64>),
    /// Clamps every element to `[-bound, bound]`. The gradients are read a second time, for the
    /// report.
    Clamp(f64),
    /// Skips the step.
    Skip,
}

impl ClipDecision {
    /// The bound to measure the gradients with.
    fn bound(&self) -> Option<f64> {
        match self {
            Self::Clamp(bound) => Some(*bound),
            _ => None,
        }
    }

    fn check(&self, vars: usize) -> Result<()> {
        let coef = |value: f64| {
            if value >= 0.0 && value.is_finite() {
                return Ok(());
            }
            Err(Error::InvalidOption {
                name: "a coefficient of the ClipRule",
                value,
                expected: "0 or a finite value above",
            })
        };
        match self {
            Self::Keep | Self::Skip => Ok(()),
            Self::Scale(value) => coef(*value),
            Self::ScaleEach(values) if values.len() != vars => Err(Error::InvalidOption {
                name: "the number of coefficients of the ClipRule",
                value: values.len() as f64,
                expected: "one for each of GradNorms::names",
            }),
            Self::ScaleEach(values) => values.iter().try_for_each(|value| coef(*value)),
            Self::Clamp(bound) => check_limit("the bound of the ClipRule", *bound),
        }
    }

    /// The internal form of a checked decision, for gradients measured with
    /// [`ClipDecision::bound`].
    fn decide(&self, given: &Given<'_>) -> Decision {
        match self {
            Self::Keep => Decision::scale(given, 1.0),
            Self::Scale(coef) => Decision::scale(given, *coef),
            Self::ScaleEach(coefs) => {
                let entries = given.measured.entries.iter().zip(coefs);
                let coef = entries.map(|(entry, coef)| entry.grad.map_or(1.0, |_| *coef));
                per_var::scale(given, coef.collect())
            }
            Self::Clamp(bound) => value::clamp(*bound, given),
            Self::Skip => Decision::skip(SkipReason::Rule),
        }
    }
}

/// A running user-defined rule.
pub(super) struct Custom {
    rule: Box<dyn ClipRule>,
    /// Its input and decision in this step.
    decided: Option<(GradNorms, ClipDecision)>,
}

impl Custom {
    pub(super) fn new(rule: impl ClipRule + 'static) -> Self {
        Self {
            rule: Box::new(rule),
            decided: None,
        }
    }
}

impl Rule for Custom {
    fn ask(&mut self, asked: &Asked<'_>) -> Result<Option<f64>> {
        self.decided = None;
        let view = GradNorms::new(asked);
        let decision = self.rule.decide(&view);
        decision.check(asked.measured.entries.len())?;
        let bound = decision.bound();
        self.decided = Some((view, decision));
        Ok(bound)
    }

    fn decide(&mut self, given: &Given<'_>) -> Decision {
        match &self.decided {
            Some((_, decision)) => decision.decide(given),
            None => Decision::scale(given, 1.0), // not reached: `ask` comes first
        }
    }

    fn observe(&mut self) {
        if let Some((measured, decision)) = self.decided.take()
            && measured.total_norm.is_finite()
        {
            self.rule.observe(&measured, &decision);
        }
    }

    fn reads_loss(&self) -> bool {
        self.rule.reads_loss()
    }

    fn save(&self) -> Saved {
        Saved::numbers(self.rule.save())
    }

    fn load(&mut self, saved: &Saved) -> std::result::Result<(), String> {
        self.rule.load(&saved.numbers)
    }
}
