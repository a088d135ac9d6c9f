//! A quantile of the norms in one number: after each step `max_norm <- max_norm * exp(-rate * (b - target))`, with b = 1
//! for a norm within the limit and 0 for one above.
//!
//! Andrew, Thakkar, McMahan, Ramaswamy (2021), "Differentially private learning with adaptive clipping", arXiv
//! 1905.03871 (eq. 2): there of the share of examples, without noise here.

use super::{Clip, history};
use crate::check::check_limit;
use crate::error::{Error, Result};

/// A limit that a given share of the norms stays below, of [`Clip::quantile`].
///
/// ```text
/// g <- g * min(1, max_norm / (total_norm + eps))
/// max_norm <- max_norm * exp(-rate * (b - target))    b = 1 if total_norm <= max_norm, else 0
/// ```
///
/// It starts as the first norm that is not 0, and a gradient of norm 0 leaves it alone. One number is kept, however long the
/// training; AutoClip keeps a window of norms.
/// Where the norms' distribution does not change, the limit goes to their `target` quantile, and around it in steps of
/// `rate`. From a limit that is far too low (after norms that were tiny) it rises by `exp(rate * target)` a step: `ln(norm / max_norm) /
/// (rate * target)` steps.
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
    /// How fast the limit moves. Default: 0.2.
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

impl From<QuantileClip> for Clip {
    fn from(rule: QuantileClip) -> Self {
        Self::new(super::Method::Quantile(rule))
    }
}

impl QuantileClip {
    pub(super) fn check(&self) -> Result<()> {
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

    pub(super) fn max_norm(state: &State) -> f64 {
        state.max_norm.unwrap_or(f64::INFINITY)
    }

    pub(super) fn observe(&self, state: &mut State, norm: f64) {
        if !history::counts(norm) {
            return;
        }
        let max_norm = state.max_norm.unwrap_or(norm);
        let within = if norm <= max_norm { 1.0 } else { 0.0 };
        let next = max_norm * (-self.rate * (within - self.target)).exp();
        // In f64's normal range, or no product could bring it back.
        state.max_norm = Some(next.clamp(f64::MIN_POSITIVE, f64::MAX));
    }
}

/// The limit, as soon as there is one.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct State {
    pub(super) max_norm: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::{QuantileClip, State};

    #[test]
    fn the_limit_moves_by_the_rate() {
        let rule = QuantileClip {
            target: 0.75,
            rate: 0.4,
        };
        let mut state = State::default();
        rule.observe(&mut state, 0.0);
        assert_eq!(QuantileClip::max_norm(&state), f64::INFINITY);
        rule.observe(&mut state, 2.0); // within: 2 exp(-0.1)
        assert!((QuantileClip::max_norm(&state) - 2.0 * (-0.1f64).exp()).abs() < 1e-15);
        rule.observe(&mut state, 9.0); // above: exp(0.3)
        assert!((QuantileClip::max_norm(&state) - 2.0 * 0.2f64.exp()).abs() < 1e-15);
    }
}
