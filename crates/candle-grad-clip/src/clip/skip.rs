//! Rules that skip a step whose norm is too large: above a fixed limit, or too many standard deviations above the mean
//! of the norms before.
//!
//! Megatron-LM's check of the norm before a step (fixed limit); OLMo-core's `SkipStepOptimizer` (z-score, window 128).

use std::collections::VecDeque;

use super::{Clip, Observed, check_limit};
use crate::{Error, Result};

/// Steps that are skipped since their norm is too large, of [`Clip::skip_norm`] and [`Clip::skip_zscore`].
///
/// With the mean `m` and the unbiased standard deviation `s` of the last `window` norms, this step's not included:
///
/// ```text
/// skip if total_norm > norm, or if total_norm - m > z * s      (once there are max(2, window / 2) norms)
/// else g <- g * min(1, max_norm / (total_norm + eps))
/// ```
///
/// A skipped step changes nothing, neither weights nor optimizer state nor the window. (In OLMo-core the norms of skipped steps
/// enter the window; here [`Clip::max_skips`] ends a training whose norms have risen for good.) Skipped steps are
/// in the report, with [`SkipReason::LargeNorm`](crate::SkipReason::LargeNorm), and warned of.
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
    /// How many norms count, 2 or more. Default: 128.
    pub window: usize,
    /// What the norm is clipped to in a step that is taken; infinite for nothing, the default.
    pub max_norm: f64,
}

impl Default for SkipSteps {
    fn default() -> Self {
        Self {
            norm: f64::INFINITY,
            z: f64::INFINITY,
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

    /// Whether a step with this norm is skipped; not one that is NaN.
    pub(super) fn skips(&self, window: &Window, norm: f64) -> bool {
        if norm > self.norm {
            return true;
        }
        let norms = &window.norms;
        if self.z == f64::INFINITY || norms.len() < (self.window / 2).max(2) {
            return false;
        }
        let mean = norms.iter().sum::<f64>() / norms.len() as f64;
        let squares: f64 = norms.iter().map(|norm| (norm - mean).powi(2)).sum();
        let deviation = (squares / (norms.len() - 1) as f64).sqrt();
        norm - mean > self.z * deviation
    }

    /// What the window gets: nothing where it is not asked.
    pub(super) fn observed(&self, norm: Option<f64>) -> Observed {
        Observed::norm(norm.filter(|_| self.z < f64::INFINITY))
    }

    pub(super) fn observe(&self, window: &mut Window, norm: f64) {
        window.norms.push_back(norm);
        window.shorten(self.window);
    }
}

/// The latest norms of steps that were taken.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Window {
    pub(super) norms: VecDeque<f64>,
}

impl Window {
    /// Forgets the oldest until `window` are left.
    pub(super) fn shorten(&mut self, window: usize) {
        let excess = self.norms.len().saturating_sub(window);
        self.norms.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use super::{SkipSteps, Window};

    #[test]
    fn a_norm_is_compared_with_those_before() {
        let rule = SkipSteps {
            z: 2.0,
            window: 4,
            ..SkipSteps::default()
        };
        let mut window = Window::default();
        for norm in [1.0, 3.0] {
            assert!(!rule.skips(&window, 1e9), "not active before two norms");
            rule.observe(&mut window, norm);
        }
        // Mean 2, deviation sqrt(2): the limit is 4.83.
        assert!(!rule.skips(&window, 4.8));
        assert!(rule.skips(&window, 4.9));
        assert!(rule.skips(&window, f64::INFINITY));
    }

    #[test]
    fn a_fixed_limit_needs_no_window() {
        let rule = SkipSteps {
            norm: 1.0,
            ..SkipSteps::default()
        };
        assert!(!rule.skips(&Window::default(), 1.0));
        assert!(rule.skips(&Window::default(), 2.0));
    }
}
