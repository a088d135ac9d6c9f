//! decide: from measurements to what is to be done. One method a file, pure arithmetic.

mod edits;
mod groups;
mod non_finite;
mod norm;
pub(crate) mod record;
mod value;

use std::fmt;

use candle_grad_clip_kernels::{Edit, NormType};

pub(crate) use edits::Edits;
pub use groups::GroupRecord;
pub(crate) use groups::Limits;
pub use non_finite::NonFinite;
pub(crate) use norm::clip_coef;

use crate::measure::{Measurements, Request};
use crate::norm::checked;
use crate::{Error, Result};

/// What to do to the gradients of a step: plain data, checked by whatever takes it.
///
/// | | |
/// |---|---|
/// | [`Clip::none`] | measure and report only |
/// | [`Clip::norm`] | `g * min(1, max_norm / (total_norm + eps))`, one coefficient for all Vars |
/// | [`Clip::value`] | every element into `[-clip_value, clip_value]` |
///
/// ```
/// use candle_grad_clip::{Clip, NonFinite};
///
/// let clip = Clip::norm(1.0).non_finite(NonFinite::Error);
/// assert_eq!(clip.to_string(), "norm:1");
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Clip {
    method: Method,
    norm_type: NormType,
    eps: f64,
    pub(crate) non_finite: NonFinite,
    pub(crate) max_skips: u32,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Method {
    None,
    Norm { max_norm: f64 },
    Value { clip_value: f64 },
}

/// `eps` of `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15).
pub(crate) const CLIP_EPS: f64 = 1e-6;

impl Clip {
    fn new(method: Method) -> Self {
        Self {
            method,
            norm_type: NormType::L2,
            eps: CLIP_EPS,
            non_finite: NonFinite::SkipStep,
            max_skips: 10,
        }
    }

    /// Measures and reports, and changes no gradient.
    ///
    /// The policy for gradients that are not finite holds here as well: a step with a NaN is skipped
    /// unless [`Clip::non_finite`] says otherwise.
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

    /// What [`Clip::norm`] adds to the norm before it divides by it. Default: 1e-6, as in PyTorch.
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
        self.eps = eps;
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
        match self.method {
            Method::None => {}
            Method::Norm { max_norm } => check_limit("max_norm", max_norm)?,
            Method::Value { clip_value } => check_limit("clip_value", clip_value)?,
        }
        checked(self.norm_type)?;
        check_eps(self.eps)
    }

    pub(crate) fn request(&self) -> Request {
        let clip_value = match self.method {
            Method::Value { clip_value } => Some(clip_value),
            Method::None | Method::Norm { .. } => None,
        };
        Request {
            norm_type: self.norm_type,
            clip_value,
            zero_non_finite: self.non_finite == NonFinite::Zero,
        }
    }

    /// Whether groups may have limits of their own.
    pub(crate) fn check_groups(&self, has_limits: bool) -> Result<()> {
        match self.method {
            Method::Value { clip_value } if has_limits => Err(Error::InvalidOption {
                name: "clip_value",
                value: clip_value,
                expected: "Clip::norm or Clip::none together with groups that have a max_norm",
            }),
            _ => Ok(()),
        }
    }

    /// What is to be done with gradients that measured so, of Vars in groups.
    pub(crate) fn decide(&self, measured: &Measurements<'_>, limits: &Limits) -> Decision {
        let bad = measured.total.stats.non_finite() > 0;
        let zero_non_finite = match self.non_finite {
            NonFinite::Error | NonFinite::SkipStep if bad => return Decision::REFUSE,
            NonFinite::Zero => bad,
            NonFinite::Error | NonFinite::SkipStep | NonFinite::Propagate => false,
        };
        let decision = match self.method {
            Method::None => Decision::scale(measured, 1.0, zero_non_finite),
            Method::Norm { max_norm } => {
                norm::decide(measured, max_norm, self.eps, zero_non_finite)
            }
            Method::Value { clip_value } => value::decide(measured, clip_value, zero_non_finite),
        };
        if limits.is_empty() {
            return decision;
        }
        groups::decide(measured, decision, limits, self.eps, zero_non_finite)
    }
}

/// The method and its limit, as command lines write them: `none`, `norm:1`, `value:0.1`.
impl fmt::Display for Clip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.method {
            Method::None => f.write_str("none"),
            Method::Norm { max_norm } => write!(f, "norm:{max_norm}"),
            Method::Value { clip_value } => write!(f, "value:{clip_value}"),
        }
    }
}

/// A limit in a [`Clip`]: 0 is refused, as those who write it mean "off" and would freeze the model.
pub(crate) fn check_limit(name: &'static str, value: f64) -> Result<()> {
    if value > 0.0 {
        return Ok(());
    }
    let expected = if value == 0.0 {
        "a value above 0: 0 would set every gradient to 0; Clip::none() turns clipping off"
    } else {
        "a value above 0"
    };
    Err(Error::InvalidOption {
        name,
        value,
        expected,
    })
}

/// `eps` anywhere.
pub(crate) fn check_eps(eps: f64) -> Result<()> {
    if eps >= 0.0 && eps.is_finite() {
        Ok(())
    } else {
        Err(Error::InvalidOption {
            name: "eps",
            value: eps,
            expected: "0 or a finite value above",
        })
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
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// Nothing is changed and nothing copied.
    Leave,
    Edit(Edits),
    /// The gradients are not finite and the policy is to take no step with them.
    Refuse,
}

impl Decision {
    pub(crate) const REFUSE: Self = Self {
        action: Action::Refuse,
        clip_coef: 0.0,
        clipped_norm: 0.0,
        was_clipped: false,
        num_clipped: 0,
        groups: Vec::new(),
    };

    /// For gradients that are still multiplied by `scale`.
    pub(crate) fn of_scaled(mut self, scale: f64) -> Self {
        if scale != 1.0 {
            self.action = match self.action {
                Action::Refuse => Action::Refuse,
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
        }
    }
}
