//! Rules that skip a step whose norm or loss is too large: above a fixed limit, or too many standard deviations above the mean
//! of those before.
//!
//! Megatron-LM's check of the norm before a step (fixed limit); OLMo-core's `SkipStepOptimizer` (z-score, window 128).

use std::collections::VecDeque;

use super::{Clip, Observed, history};
use crate::check::check_limit;
use crate::error::{Error, Result};
use crate::skip_reason::SkipReason;

/// Steps that are skipped since their norm or loss is too large, of [`Clip::skip_norm`] and [`Clip::skip_zscore`].
///
/// With the mean `m` and the unbiased standard deviation `s` of the last `window` norms, this step's not included, and the same of the
/// losses:
///
/// ```text
/// skip if total_norm > norm, or if total_norm - m > z * s           (once there are max(2, window / 2) norms)
///      or if loss - m_loss > loss_z * s_loss                        (once there are as many losses)
/// else g <- g * min(1, max_norm / (total_norm + eps))
/// ```
///
/// A deviation counts as at least 0.001 of the mean's size (and 1e-6 for losses): after a plateau of equal norms a step with one that is
/// slightly larger is taken. A step whose norm is 0 is taken and enters neither window, as there is nothing to clip.
///
/// A skipped step changes nothing, neither weights nor optimizer state nor the windows. (In OLMo-core the norms of skipped steps
/// enter the window; here [`Clip::max_skips`] ends a training whose norms have risen for good.) Skipped steps are
/// in the report, with [`SkipReason::LargeNorm`](crate::SkipReason::LargeNorm) or
/// [`SkipReason::LargeLoss`](crate::SkipReason::LargeLoss), and warned of.
///
/// # The loss
/// With a `loss_z`, `backward_step` and [`backward_step_report`](crate::ClippedOptimizer::backward_step_report) read the loss, which must be
/// one number: on a GPU that waits for it. [`step`](candle_nn::Optimizer::step) and [`step_report`](crate::ClippedOptimizer::step_report)
/// know of no loss: the norm decides alone then, and nothing enters the losses. Give it to
/// [`step_report_with_loss`](crate::ClippedOptimizer::step_report_with_loss). A loss that is not finite enters nothing.
///
/// # References
/// OLMo-core's `SkipStepOptimizer`: window 128, z 6 on norm or loss. Megatron-LM: a fixed limit.
///
/// ```
/// use candle_grad_clip::{Clip, SkipSteps};
///
/// let clip = Clip::from(SkipSteps { z: 6.0, max_norm: 1.0, ..SkipSteps::default() }); // clips as well
/// assert_eq!(clip.to_string(), "skip:z=6,max_norm=1");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SkipSteps {
    /// The largest norm of a step that is taken; infinite for any, the default.
    pub norm: f64,
    /// The largest number of standard deviations above the mean; infinite for any, the default.
    pub z: f64,
    /// The same for the loss; infinite for any, the default, which does not read it.
    pub loss_z: f64,
    /// How many norms, and losses, count, 2 or more. Default: 128.
    pub window: usize,
    /// What the norm is clipped to in a step that is taken; infinite for nothing, the default.
    pub max_norm: f64,
}

impl Default for SkipSteps {
    fn default() -> Self {
        Self {
            norm: f64::INFINITY,
            z: f64::INFINITY,
            loss_z: f64::INFINITY,
            window: 128,
            max_norm: f64::INFINITY,
        }
    }
}

impl From<SkipSteps> for Clip {
    fn from(rule: SkipSteps) -> Self {
        Self::new(super::Method::Skip(rule))
    }
}

impl SkipSteps {
    pub(super) fn check(&self) -> Result<()> {
        check_limit("norm", self.norm)?;
        check_limit("z", self.z)?;
        check_limit("loss_z", self.loss_z)?;
        check_limit("max_norm", self.max_norm)?;
        if self.window < 2 {
            return Err(Error::InvalidOption {
                name: "window",
                value: self.window as f64,
                expected: "2 norms or more",
            });
        }
        Ok(())
    }

    /// Why a step with this norm and loss is skipped, if it is; neither of them skips it as NaN.
    pub(super) fn skips(
        &self,
        window: &Window,
        norm: f64,
        loss: Option<f64>,
    ) -> Option<SkipReason> {
        if norm > self.norm || self.is_beyond(self.z, &window.norms, norm, history::spread) {
            return Some(SkipReason::LargeNorm);
        }
        let is_beyond =
            |loss| self.is_beyond(self.loss_z, &window.losses, loss, history::loss_spread);
        let beyond = loss.is_some_and(is_beyond);
        beyond.then_some(SkipReason::LargeLoss)
    }

    /// Whether a value is more than `z` standard deviations above the mean of those before.
    fn is_beyond(
        &self,
        z: f64,
        before: &VecDeque<f64>,
        value: f64,
        spread: fn(f64, f64) -> f64,
    ) -> bool {
        if z == f64::INFINITY || before.len() < (self.window / 2).max(2) {
            return false;
        }
        let mean = before.iter().sum::<f64>() / before.len() as f64;
        let squares: f64 = before.iter().map(|x| (x - mean).powi(2)).sum();
        let deviation = (squares / (before.len() - 1) as f64).sqrt();
        value - mean > z * spread(deviation, mean)
    }

    /// What the windows get: nothing where they are not asked.
    pub(super) fn observed(&self, norm: Option<f64>, loss: Option<f64>) -> Observed {
        let norm = norm.filter(|_| self.z < f64::INFINITY);
        let loss = loss.filter(|loss| self.loss_z < f64::INFINITY && loss.is_finite());
        Observed::Skip { norm, loss }
    }

    pub(super) fn observe(&self, window: &mut Window, norm: Option<f64>, loss: Option<f64>) {
        window.norms.extend(norm);
        window.losses.extend(loss);
        window.shorten(self.window);
    }
}

/// The latest norms and losses of steps that were taken.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Window {
    pub(super) norms: VecDeque<f64>,
    pub(super) losses: VecDeque<f64>,
}

impl Window {
    /// What is left of a history of other settings, or of a file.
    pub(super) fn adapt(&mut self, window: usize) {
        self.norms.retain(|norm| history::counts(*norm));
        self.shorten(window);
    }

    /// Forgets the oldest until `window` are left.
    pub(super) fn shorten(&mut self, window: usize) {
        for values in [&mut self.norms, &mut self.losses] {
            let excess = values.len().saturating_sub(window);
            values.drain(..excess);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{SkipReason, SkipSteps, Window};

    #[test]
    fn a_norm_is_compared_with_those_before() {
        let rule = SkipSteps {
            z: 2.0,
            window: 4,
            ..SkipSteps::default()
        };
        let mut window = Window::default();
        for norm in [1.0, 3.0] {
            let skips = rule.skips(&window, 1e9, None);
            assert_eq!(skips, None, "not active before two norms");
            rule.observe(&mut window, Some(norm), None);
        }
        // Mean 2, deviation sqrt(2): the limit is 4.83.
        assert_eq!(rule.skips(&window, 4.8, None), None);
        let too_large = Some(SkipReason::LargeNorm);
        assert_eq!(rule.skips(&window, 4.9, None), too_large);
        assert_eq!(rule.skips(&window, f64::INFINITY, None), too_large);
    }

    #[test]
    fn a_loss_is_compared_with_those_before() {
        let rule = SkipSteps {
            loss_z: 2.0,
            window: 4,
            ..SkipSteps::default()
        };
        let mut window = Window::default();
        for loss in [-3.0, -1.0] {
            assert_eq!(rule.skips(&window, 1.0, Some(1e9)), None);
            rule.observe(&mut window, None, Some(loss));
        }
        // Mean -2, deviation sqrt(2): the limit is 0.83.
        assert_eq!(rule.skips(&window, 1e9, Some(0.8)), None);
        assert_eq!(rule.skips(&window, 1e9, None), None);
        assert_eq!(rule.skips(&window, 1e9, Some(f64::NAN)), None);
        let too_large = Some(SkipReason::LargeLoss);
        assert_eq!(rule.skips(&window, 1.0, Some(0.9)), too_large);
    }

    #[test]
    fn a_fixed_limit_needs_no_window() {
        let rule = SkipSteps {
            norm: 1.0,
            ..SkipSteps::default()
        };
        assert_eq!(rule.skips(&Window::default(), 1.0, None), None);
        let too_large = Some(SkipReason::LargeNorm);
        assert_eq!(rule.skips(&Window::default(), 2.0, None), too_large);
    }
}
