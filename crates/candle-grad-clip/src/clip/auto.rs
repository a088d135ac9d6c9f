//! AutoClip: the limit is a percentile of the norms so far, this step's included:
//! `max_norm = percentile(norms, p)`, then `clip_coef = min(1, max_norm / (total_norm + eps))`.
//!
//! Seetharaman, Wichern, Pardo, Le Roux (2020), "AutoClip: Adaptive gradient clipping for source
//! separation networks", arXiv 2007.14469: p = 10, all norms, linear interpolation.

use std::collections::VecDeque;
use std::fmt;

use super::decision::{Decision, Given};
use super::history;
use super::norm::clip_to;
use super::options::{Options, Writer};
use super::rule::{Method, Rule, Saved};
use crate::error::{Error, Result};

/// AutoClip ([`Clip::autoclip`](crate::Clip::autoclip)): clips the global norm to a percentile of
/// the norms so far, this step's included.
///
/// ```text
/// max_norm = percentile(norms, p)                 linear between neighbours, as numpy.percentile
/// g <- g * min(1, max_norm / (total_norm + eps))
/// ```
///
/// The history holds the last `window` norms, or [`AutoClip::DEFAULT_WINDOW`] norms if `window` is
/// `None`. With the default it takes 1.6 MB of memory and 0.8 MB in a checkpoint, and a step moves
/// at most 1.6 MB.
///
/// A norm of 0 does not enter the history, because there is nothing to clip. After a phase of very
/// small norms the limit stays low until few of them are left in the window, for at most `window`
/// steps.
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
    /// Length of the history, this step's norm included. Default: `None`, which means
    /// [`AutoClip::DEFAULT_WINDOW`].
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

impl AutoClip {
    /// The length of the history if [`window`](Self::window) is `None`: 100,000 norms.
    ///
    /// The paper uses all norms. The limit is the same until 100,000 norms were seen. After that,
    /// as long as the norms' distribution does not change, the percentile has a standard error of
    /// `100 sqrt(q (1 - q) / window)` points, with `q = percentile / 100`: 0.1 points for the 10th
    /// percentile, 0.16 for the median. If the distribution changes, the limit follows the latest
    /// norms, while the limit of the full history lags.
    pub const DEFAULT_WINDOW: usize = 100_000;

    /// The length of the history.
    fn kept(&self) -> usize {
        self.window.unwrap_or(Self::DEFAULT_WINDOW)
    }
}

impl Method for AutoClip {
    fn parse(options: &mut Options<'_>) -> Result<Self> {
        Ok(Self {
            percentile: options.number("percentile", Self::default().percentile)?,
            window: options.take("window", "a whole number")?,
        })
    }

    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        out.main(self.percentile)?;
        out.option("window", self.window.unwrap_or(0), 0)
    }

    fn check(&self, _: f64) -> Result<()> {
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

    fn start(&self) -> Box<dyn Rule> {
        Box::new(Live::from(*self))
    }
}

/// The running rule: the latest norms of the taken steps, in order of time and sorted.
#[derive(Debug, Default)]
struct Live {
    config: AutoClip,
    order: VecDeque<f64>,
    sorted: Vec<f64>,
    /// What this step adds to the history.
    norm: Option<f64>,
}

impl From<AutoClip> for Live {
    fn from(config: AutoClip) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }
}

impl Live {
    /// The limit for a step with this norm; infinite if there is no norm at all.
    fn max_norm(&self, norm: Option<f64>) -> f64 {
        let leaves = norm.is_some() && self.order.len() >= self.config.kept();
        let oldest = self.order.front().filter(|_| leaves);
        percentile_with(&self.sorted, oldest.copied(), norm, self.config.percentile)
            .unwrap_or(f64::INFINITY)
    }

    /// Drops the oldest norms until there is room for one more.
    fn make_place(&mut self) {
        while self.order.len() >= self.config.kept() {
            let Some(oldest) = self.order.pop_front() else {
                return;
            };
            let place = self.sorted.partition_point(|x| *x < oldest);
            self.sorted.remove(place);
        }
    }
}

impl Rule for Live {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        self.norm = given.norm_that_counts();
        let max_norm = self.max_norm(self.norm);
        clip_to(history::limit(max_norm, given.total_norm()), given)
    }

    fn observe(&mut self) {
        let Some(norm) = self.norm.take() else { return };
        self.make_place();
        self.order.push_back(norm);
        let place = self.sorted.partition_point(|x| *x < norm);
        self.sorted.insert(place, norm);
    }

    fn save(&self) -> Saved {
        Saved::numbers(self.order.iter().copied().collect())
    }

    fn load(&mut self, saved: &Saved) -> std::result::Result<(), String> {
        let norms = saved.only_numbers()?;
        history::check_norms(norms)?;
        let latest = &norms[norms.len().saturating_sub(self.config.kept())..];
        self.order = history::that_count(latest).collect();
        self.sorted = history::that_count(latest).collect();
        self.sorted.sort_by(f64::total_cmp);
        Ok(())
    }
}
/// The percentile of `sorted` without `left` (an element of it) and with `came`. Copies nothing.
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{AutoClip, Live, Rule, Saved};
    use crate::clip::testing::step;

    fn live(percentile: f64, window: Option<usize>) -> Live {
        AutoClip { percentile, window }.into()
    }

    #[test]
    fn the_limit_is_the_percentile_with_this_norm() {
        let mut rule = live(25.0, None);
        assert_eq!(rule.max_norm(None), f64::INFINITY);
        assert_eq!(rule.max_norm(Some(4.0)), 4.0);
        for norm in [8.0, 1.0, 4.0] {
            step(&mut rule, norm, None);
        }
        assert_eq!(rule.max_norm(Some(2.0)), 1.75); // numpy.percentile([1, 2, 4, 8], 25)
        assert_eq!(rule.max_norm(None), 2.5); // of 1, 4, 8
    }

    #[test]
    fn a_window_forgets_the_oldest() {
        let mut rule = live(50.0, Some(3));
        for norm in [100.0, 1.0, 4.0] {
            step(&mut rule, norm, None);
        }
        assert_eq!(rule.max_norm(Some(2.0)), 2.0); // of 1, 2, 4
        step(&mut rule, 2.0, None);
        assert_eq!(rule.save().numbers, [1.0, 4.0, 2.0]);
    }

    #[test]
    fn without_a_window_the_length_is_bounded() {
        let bound = AutoClip::DEFAULT_WINDOW;
        let all = (1..=2 * bound).map(|norm| norm as f64).collect();
        let mut rule = live(0.0, None);
        rule.load(&Saved::numbers(all)).unwrap();
        assert_eq!(rule.order.len(), bound);
        assert_eq!(rule.max_norm(None), (bound + 1) as f64);
        step(&mut rule, 3e5, None);
        assert_eq!(rule.order.len(), bound);
        assert_eq!(rule.max_norm(None), (bound + 2) as f64);
        // This norm pushes the oldest out.
        assert_eq!(rule.max_norm(Some(4e5)), (bound + 3) as f64);
    }

    #[test]
    fn zeros_and_bad_numbers_do_not_enter() {
        let mut rule = live(0.0, None);
        let zeros = Saved::numbers(vec![0.0, 3.0, 0.0, 2.0]);
        rule.load(&zeros).unwrap();
        assert_eq!(rule.save().numbers, [3.0, 2.0]);
        let error = rule.load(&Saved::numbers(vec![1.0, -2.0])).unwrap_err();
        assert!(error.contains("history has -2"), "{error}");
        assert_eq!(rule.save().numbers, [3.0, 2.0]);
    }
}
