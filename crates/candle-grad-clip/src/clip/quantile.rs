//! A running estimate of a quantile of the norms: after each step `max_norm` is multiplied by
//! `exp(-rate * (b - target))`, with `b` = 1 for a norm within the limit and 0 for one above.
//!
//! Andrew, Thakkar, McMahan, Ramaswamy (2021), "Differentially private learning with adaptive
//! clipping", arXiv 1905.03871 (eq. 2). There b is a share of examples, with noise.

use std::fmt;

use super::decision::{Decision, Given};
use super::history;
use super::norm::clip_to;
use super::options::{Options, Writer};
use super::rule::{Method, Rule, Saved};
use crate::check::check_limit;
use crate::error::{Error, Result};

/// Clips the global norm to a running estimate of a quantile of the norms
/// ([`Clip::quantile`](crate::Clip::quantile)).
///
/// ```text
/// g <- g * min(1, max_norm / (total_norm + eps))
/// max_norm <- max_norm * exp(-rate * (b - target))    b = 1 if total_norm <= max_norm, else 0
/// ```
///
/// The limit starts at the first norm that is not 0. A norm of 0 does not change it. The state is
/// one number, whereas AutoClip keeps a window of norms. As long as the norms' distribution does
/// not change, the limit moves to their `target` quantile, and then around it in relative steps of
/// about `rate`. If the limit is far too low (after very small norms), it rises by the factor
/// `exp(rate * target)` per step. This takes `ln(norm / max_norm) / (rate * target)` steps.
///
/// # References
/// Andrew and others (2021), arXiv 1905.03871; Opacus' `AdaClipDPOptimizer`.
///
/// ```
/// use candle_grad_clip::{Clip, QuantileClip};
///
/// let clip = Clip::from(QuantileClip { target: 0.9, rate: 0.05 });
/// assert_eq!(clip.to_string(), "quantile:0.9,rate=0.05");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantileClip {
    /// The share of norms within the limit, between 0 and 1. Default: 0.5.
    pub target: f64,
    /// Step size of the limit's logarithm, above 0. Default: 0.2.
    pub rate: f64,
}

impl Default for QuantileClip {
    fn default() -> Self {
        Self {
            target: 0.5,
            rate: 0.2,
        }
    }
}

impl Method for QuantileClip {
    fn parse(options: &mut Options<'_>) -> Result<Self> {
        Ok(Self {
            target: options.number("target", Self::default().target)?,
            rate: options.number("rate", Self::default().rate)?,
        })
    }

    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        out.main(self.target)?;
        out.option("rate", self.rate, Self::default().rate)
    }

    fn check(&self, _: f64) -> Result<()> {
        if !(self.target > 0.0 && self.target < 1.0) {
            return Err(Error::InvalidOption {
                name: "target",
                value: self.target,
                expected: "a share between 0 and 1",
            });
        }
        if self.rate.is_infinite() {
            return Err(Error::InvalidOption {
                name: "rate",
                value: self.rate,
                expected: "a finite value above 0",
            });
        }
        check_limit("rate", self.rate)
    }

    fn start(&self) -> Box<dyn Rule> {
        Box::new(Live::from(*self))
    }
}

/// The running rule.
#[derive(Debug, Default)]
struct Live {
    config: QuantileClip,
    /// The limit; `None` before the first norm.
    max_norm: Option<f64>,
    /// This step's norm, which moves the limit in `observe`.
    norm: Option<f64>,
}

impl From<QuantileClip> for Live {
    fn from(config: QuantileClip) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }
}

impl Rule for Live {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        self.norm = given.norm_that_counts();
        let max_norm = self.max_norm.unwrap_or(f64::INFINITY);
        clip_to(history::limit(max_norm, given.total_norm()), given)
    }

    fn observe(&mut self) {
        let Some(norm) = self.norm.take() else { return };
        let QuantileClip { target, rate } = self.config;
        let max_norm = self.max_norm.unwrap_or(norm);
        let within = if norm <= max_norm { 1.0 } else { 0.0 };
        let next = max_norm * (-rate * (within - target)).exp();
        // Stays in f64's normal range: no factor brings 0 or infinity back.
        self.max_norm = Some(next.clamp(f64::MIN_POSITIVE, f64::MAX));
    }

    fn save(&self) -> Saved {
        Saved::numbers(self.max_norm.into_iter().collect())
    }

    fn load(&mut self, saved: &Saved) -> std::result::Result<(), String> {
        match saved.only_numbers()? {
            [max_norm] if history::counts(*max_norm) => self.max_norm = Some(*max_norm),
            other => {
                return Err(format!(
                    "the clip's history has {other:?}, expected a limit"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Live, QuantileClip, Rule, Saved};
    use crate::clip::testing::step;

    #[test]
    fn the_limit_moves_by_the_rate() {
        let config = QuantileClip {
            target: 0.75,
            rate: 0.4,
        };
        let mut rule = Live::from(config);
        step(&mut rule, 0.0, None);
        assert_eq!(rule.max_norm, None);
        step(&mut rule, 2.0, None); // within: 2 exp(-0.1)
        let first = 2.0 * (-0.1f64).exp();
        assert!((rule.max_norm.unwrap_or(0.0) - first).abs() < 1e-15);
        let decision = step(&mut rule, 9.0, None); // above: exp(0.3)
        assert!((decision.clipped_norm - first).abs() < 1e-6);
        assert!((rule.max_norm.unwrap_or(0.0) - 2.0 * 0.2f64.exp()).abs() < 1e-15);
        assert!(rule.load(&Saved::numbers(vec![0.0])).is_err());
    }
}
