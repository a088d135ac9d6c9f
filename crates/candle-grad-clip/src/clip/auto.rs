//! AutoClip: the limit is a percentile of the norms so far, this step's included:
//! `max_norm = percentile(norms, p)`, then `clip_coef = min(1, max_norm / (total_norm + eps))`.
//!
//! Seetharaman, Wichern, Pardo, Le Roux (2020), "AutoClip: Adaptive gradient clipping for source separation
//! networks", arXiv 2007.14469: p = 10, all norms, linear interpolation.

use std::collections::VecDeque;

use super::{Clip, history};
use crate::error::{Error, Result};

/// AutoClip, of [`Clip::auto`]: clips to a percentile of the norms so far, this step's included.
///
/// ```text
/// max_norm = percentile(norms, p)                 linear between neighbours, as numpy.percentile
/// g <- g * min(1, max_norm / (total_norm + eps))
/// ```
///
/// The history has a bounded length: `window` norms, [`AutoClip::DEFAULT_WINDOW`] where there is none. A step moves at most 8 bytes
/// for each of them (800 kB with the default), and memory and checkpoints hold each norm (1.6 MB with the default).
///
/// A gradient of norm 0 does not enter: there is nothing to clip. Norms that were tiny, before ordinary ones, hold the limit down
/// until they are few enough in the window: at most for its length.
///
/// # References
/// Seetharaman and others (2020), arXiv 2007.14469.
///
/// ```
/// use candle_grad_clip::{AutoClip, Clip};
///
/// let clip = Clip::from(AutoClip { percentile: 25.0, window: Some(1000) });
/// assert_eq!(clip.to_string(), "auto:25,window=1000");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AutoClip {
    /// The percentile, 0 to 100. Default: 10.
    pub percentile: f64,
    /// How many of the latest norms count, this step's included; for `None`, the default, [`AutoClip::DEFAULT_WINDOW`].
    pub window: Option<usize>,
}

impl Default for AutoClip {
    fn default() -> Self {
        Self {
            percentile: 10.0,
            window: None,
        }
    }
}

impl From<AutoClip> for Clip {
    fn from(rule: AutoClip) -> Self {
        Self::new(super::Method::Auto(rule))
    }
}

impl AutoClip {
    /// The norms that count without a [`window`](Self::window), of a training that is longer: the latest 100,000.
    ///
    /// The paper takes all. While fewer steps were taken it is the same. From then on, where the norms' distribution does not change,
    /// the limit is that of another percentile, with a standard error of `100 sqrt(q (1 - q) / window)` points, `q = percentile
    /// / 100`: 0.1 points for the 10th, 0.16 for the median. Where it does change, the limit follows the latest norms, and that of
    /// the full history lags.
    pub const DEFAULT_WINDOW: usize = 100_000;

    /// How many norms are kept.
    pub(super) fn kept(&self) -> usize {
        self.window.unwrap_or(Self::DEFAULT_WINDOW)
    }

    pub(super) fn check(&self) -> Result<()> {
        if !(0.0..=100.0).contains(&self.percentile) {
            return Err(Error::InvalidOption {
                name: "percentile",
                value: self.percentile,
                expected: "0 to 100",
            });
        }
        match self.window {
            Some(0) => Err(Error::InvalidOption {
                name: "window",
                value: 0.0,
                expected: "1 norm or more",
            }),
            _ => Ok(()),
        }
    }

    /// The limit of a step with this norm; none without any norm.
    pub(super) fn max_norm(&self, history: &History, norm: Option<f64>) -> f64 {
        let leaves = norm.is_some() && history.order.len() >= self.kept();
        let oldest = history.order.front().filter(|_| leaves);
        percentile_with(&history.sorted, oldest.copied(), norm, self.percentile)
            .unwrap_or(f64::INFINITY)
    }
}

/// The percentile of `sorted` without one `left` that is in it, and with one that `came`.
fn percentile_with(
    sorted: &[f64],
    left: Option<f64>,
    came: Option<f64>,
    percentile: f64,
) -> Option<f64> {
    let gap = left.map_or(usize::MAX, |left| sorted.partition_point(|x| *x < left));
    let kept = |k: usize| sorted[if k < gap { k } else { k + 1 }];
    let place = came.map_or(usize::MAX, |came| {
        let place = sorted.partition_point(|x| *x < came);
        if place > gap { place - 1 } else { place }
    });
    let at = |k: usize| match k.cmp(&place) {
        std::cmp::Ordering::Less => kept(k),
        std::cmp::Ordering::Equal => came.unwrap_or(f64::NAN),
        std::cmp::Ordering::Greater => kept(k - 1),
    };
    let len = sorted.len() + usize::from(came.is_some()) - usize::from(left.is_some());
    let position = percentile / 100.0 * len.checked_sub(1)? as f64;
    let (low, high) = (at(position.floor() as usize), at(position.ceil() as usize));
    Some(low + (high - low) * position.fract())
}

/// The norms so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct History {
    order: VecDeque<f64>,
    sorted: Vec<f64>,
}

impl History {
    pub(super) fn new(norms: Vec<f64>) -> Self {
        let mut sorted = norms.clone();
        sorted.sort_by(f64::total_cmp);
        Self {
            order: norms.into(),
            sorted,
        }
    }

    pub(super) fn norms(&self) -> Vec<f64> {
        self.order.iter().copied().collect()
    }

    pub(super) fn push(&mut self, norm: f64, window: Option<usize>) {
        self.shorten(window.map(|window| window - 1));
        self.order.push_back(norm);
        let place = self.sorted.partition_point(|x| *x < norm);
        self.sorted.insert(place, norm);
    }

    /// What is left of a history of other settings, or of a file.
    pub(super) fn adapt(&mut self, window: usize) {
        let oldest = self.order.len().saturating_sub(window);
        let norms = self.order.iter().skip(oldest).copied();
        if oldest > 0 || self.order.contains(&0.0) {
            *self = Self::new(norms.filter(|norm| history::counts(*norm)).collect());
        }
    }

    /// Forgets the oldest until `window` are left.
    fn shorten(&mut self, window: Option<usize>) {
        while window.is_some_and(|window| self.order.len() > window) {
            let Some(oldest) = self.order.pop_front() else {
                return;
            };
            let place = self.sorted.partition_point(|x| *x < oldest);
            self.sorted.remove(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{AutoClip, Clip, History};
    use crate::clip::{Observed, RuleState};

    #[test]
    fn the_limit_is_the_percentile_with_this_norm() {
        let rule = AutoClip {
            percentile: 25.0,
            window: None,
        };
        let mut history = History::default();
        assert_eq!(rule.max_norm(&history, None), f64::INFINITY);
        assert_eq!(rule.max_norm(&history, Some(4.0)), 4.0);
        for norm in [8.0, 1.0, 4.0] {
            history.push(norm, None);
        }
        assert_eq!(rule.max_norm(&history, Some(2.0)), 1.75); // numpy.percentile([1, 2, 4, 8], 25)
        assert_eq!(rule.max_norm(&history, None), 2.5); // of 1, 4, 8
    }

    #[test]
    fn a_window_forgets_the_oldest() {
        let rule = AutoClip {
            percentile: 50.0,
            window: Some(3),
        };
        let mut history = History::default();
        for norm in [100.0, 1.0, 4.0] {
            history.push(norm, rule.window);
        }
        assert_eq!(rule.max_norm(&history, Some(2.0)), 2.0); // of 1, 2, 4
        history.push(2.0, rule.window);
        assert_eq!(history.norms(), [1.0, 4.0, 2.0]);
    }

    #[test]
    fn without_a_window_the_length_is_bounded() {
        let rule = AutoClip {
            percentile: 0.0,
            window: None,
        };
        let bound = AutoClip::DEFAULT_WINDOW;
        let all = (1..=2 * bound).map(|norm| norm as f64).collect();
        let clip = Clip::from(rule);
        let mut state = RuleState {
            auto: History::new(all),
            ..RuleState::default()
        };
        clip.adapt(&mut state);
        assert_eq!(state.auto.norms().len(), bound);
        assert_eq!(rule.max_norm(&state.auto, None), (bound + 1) as f64);
        clip.observe(&mut state, &Observed::Norm(3e5));
        let history = state.auto;
        assert_eq!(history.norms().len(), bound);
        assert_eq!(rule.max_norm(&history, None), (bound + 2) as f64);
        // With one more the next leaves.
        assert_eq!(rule.max_norm(&history, Some(4e5)), (bound + 3) as f64);
    }
}
