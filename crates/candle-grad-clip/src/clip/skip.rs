//! A rule that skips a step whose norm or loss is too large: above a fixed limit, or too many
//! standard deviations above the mean of the previous ones.
//!
//! Megatron-LM's check of the norm before a step (fixed limit); OLMo-core's `SkipStepOptimizer`
//! (z-score, window 128).

use std::collections::VecDeque;
use std::fmt;

use super::decision::{Decision, Given};
use super::history;
use super::norm::clip_to;
use super::options::{Options, Writer};
use super::rule::{Limit, LimitKind, Method, Rule, Saved, Scope};
use crate::check::check_limit;
use crate::error::{Error, Result};
use crate::skip_reason::SkipReason;

/// Skips steps whose norm or loss is too large
/// ([`Clip::skip_above_norm`](crate::Clip::skip_above_norm) and
/// [`Clip::skip_above_zscore`](crate::Clip::skip_above_zscore)).
///
/// With the mean `m` and the unbiased standard deviation `s` of the last `window` norms, this
/// step's not included, and the same for the losses:
///
/// ```text
/// skip if total_norm > norm, or if total_norm - m > z * s           (once there are max(2, window / 2) norms)
///      or if loss - m_loss > loss_z * s_loss                        (once there are as many losses)
/// else g <- g * min(1, max_norm / (total_norm + eps))
/// ```
///
/// A deviation counts as at least 0.001 of the mean's absolute value, and at least 1e-6 for losses.
/// So after a plateau of equal norms, a slightly larger one is not skipped. A step whose norm is 0
/// is taken and enters neither window.
///
/// A skipped step changes neither weights, optimizer state nor windows. (In OLMo-core the norms of
/// skipped steps enter the window. Here, if norms rise permanently, every step is skipped until
/// [`Clip::max_skips`](crate::Clip::max_skips) raises an error.) A skipped step is in the report,
/// with [`SkipReason::LargeNorm`](crate::SkipReason::LargeNorm) or
/// [`SkipReason::LargeLoss`](crate::SkipReason::LargeLoss), and is logged as a warning.
///
/// # The loss
/// With a finite `loss_z`, `backward_step` and
/// [`backward_step_report`](crate::ClippedOptimizer::backward_step_report) read the loss, which
/// must be one number. On a GPU this waits for the loss. [`step`](candle_nn::Optimizer::step) and
/// [`step_report`](crate::ClippedOptimizer::step_report) get no loss: only the norm decides, and
/// the losses' window stays as it is.
/// [`step_report_with_loss`](crate::ClippedOptimizer::step_report_with_loss) takes the loss. A
/// non-finite loss does not enter the window.
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
    /// The largest norm of a step that is taken. Default: infinite.
    pub norm: f64,
    /// The largest number of standard deviations above the mean. Default: infinite.
    pub z: f64,
    /// The same for the loss. Default: infinite, which does not read the loss.
    pub loss_z: f64,
    /// Length of both windows, 2 or more. Default: 128.
    pub window: usize,
    /// The limit of the global norm in a step that is taken. Default: infinite.
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

impl Method for SkipSteps {
    fn parse(options: &mut Options<'_>) -> Result<Self> {
        let default = Self::default();
        let norm = options.take("norm", "a number")?;
        let z = options.take("z", "a number")?;
        let loss_z = options.take("loss_z", "a number")?;
        // OLMo's z, if no limit is given.
        let is_said = norm.is_some() || loss_z.is_some();
        let otherwise = if is_said { default.z } else { 6.0 };
        Ok(Self {
            norm: norm.unwrap_or(default.norm),
            z: z.unwrap_or(otherwise),
            loss_z: loss_z.unwrap_or(default.loss_z),
            window: options.count("window", default.window)?,
            max_norm: options.number("max_norm", default.max_norm)?,
        })
    }

    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let default = Self::default();
        out.option("norm", self.norm, default.norm)?;
        // A text without norm, z and loss_z is parsed as z=6, so z is written if the others are
        // not.
        let never = if self.norm == default.norm && self.loss_z == default.loss_z {
            0.0
        } else {
            default.z
        };
        out.option("z", self.z, never)?;
        out.option("loss_z", self.loss_z, default.loss_z)?;
        out.option("window", self.window, default.window)?;
        out.option("max_norm", self.max_norm, default.max_norm)
    }

    fn check(&self, _: f64) -> Result<()> {
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

    fn scope(&self) -> Scope {
        if self.max_norm < f64::INFINITY {
            Scope::Vars
        } else {
            Scope::Nothing
        }
    }

    fn start(&self) -> Box<dyn Rule> {
        Box::new(Live::from(*self))
    }

    fn limit(&mut self) -> Option<Limit<'_>> {
        Some((LimitKind::SideMaxNorm, "max_norm", &mut self.max_norm))
    }
}

/// The running rule: the latest norms and losses of the taken steps.
#[derive(Debug, Default)]
struct Live {
    config: SkipSteps,
    norms: VecDeque<f64>,
    losses: VecDeque<f64>,
    /// What this step adds to the windows.
    norm: Option<f64>,
    loss: Option<f64>,
}

impl From<SkipSteps> for Live {
    fn from(config: SkipSteps) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }
}

impl Live {
    /// Why a step with this norm and loss is skipped, if it is. A NaN does not skip it.
    fn skips(&self, norm: f64, loss: Option<f64>) -> Option<SkipReason> {
        let SkipSteps { z, loss_z, .. } = self.config;
        if norm > self.config.norm || self.is_beyond(z, &self.norms, norm, history::spread) {
            return Some(SkipReason::LargeNorm);
        }
        let is_beyond = |loss| self.is_beyond(loss_z, &self.losses, loss, history::loss_spread);
        let beyond = loss.is_some_and(is_beyond);
        beyond.then_some(SkipReason::LargeLoss)
    }

    /// Whether a value is more than `z` standard deviations above the mean of the previous values.
    fn is_beyond(
        &self,
        z: f64,
        before: &VecDeque<f64>,
        value: f64,
        spread: fn(f64, f64) -> f64,
    ) -> bool {
        if z == f64::INFINITY || before.len() < (self.config.window / 2).max(2) {
            return false;
        }
        let mean = before.iter().sum::<f64>() / before.len() as f64;
        let squares: f64 = before.iter().map(|x| (x - mean).powi(2)).sum();
        let deviation = (squares / (before.len() - 1) as f64).sqrt();
        value - mean > z * spread(deviation, mean)
    }

    /// Drops the oldest values beyond the windows' length.
    fn shorten(&mut self) {
        for values in [&mut self.norms, &mut self.losses] {
            let excess = values.len().saturating_sub(self.config.window);
            values.drain(..excess);
        }
    }
}

impl Rule for Live {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        let (total_norm, loss) = (given.total_norm(), given.measured.loss);
        if let Some(reason) = self.skips(total_norm, loss) {
            return Decision::skip(reason);
        }
        let SkipSteps { z, loss_z, .. } = self.config;
        // An unused window stays empty. A step with norm 0 changes neither window.
        self.norm = given.norm_that_counts().filter(|_| z < f64::INFINITY);
        self.loss = loss.filter(|loss| loss_z < f64::INFINITY && loss.is_finite());
        self.loss = self.loss.filter(|_| total_norm != 0.0);
        clip_to(self.config.max_norm, given)
    }

    fn observe(&mut self) {
        self.norms.extend(self.norm.take());
        self.losses.extend(self.loss.take());
        self.shorten();
    }

    fn reads_loss(&self) -> bool {
        self.config.loss_z < f64::INFINITY
    }

    fn set_limit(&mut self, value: f64) {
        self.config.max_norm = value;
    }

    /// The number of norms, the norms, and the losses.
    fn save(&self) -> Saved {
        if self.norms.is_empty() && self.losses.is_empty() {
            return Saved::default();
        }
        let len = self.norms.len() as f64;
        let values = self.norms.iter().chain(&self.losses).copied();
        Saved::numbers(std::iter::once(len).chain(values).collect())
    }

    fn load(&mut self, saved: &Saved) -> std::result::Result<(), String> {
        let numbers = saved.only_numbers()?;
        let split = numbers.split_first().and_then(|(len, values)| {
            let is_count = *len >= 0.0 && len.fract() == 0.0;
            values.split_at_checked(*len as usize).filter(|_| is_count)
        });
        let Some((norms, losses)) = split else {
            return Err("the clip's history has other norms than it counts".to_string());
        };
        history::check_norms(norms)?;
        if let Some(bad) = losses.iter().find(|loss| !loss.is_finite()) {
            return Err(format!("the clip's history has {bad}, expected losses"));
        }
        self.norms = history::that_count(norms).collect();
        self.losses = losses.iter().copied().collect();
        self.shorten();
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Live, Rule, Saved, SkipSteps};
    use crate::clip::testing::step;
    use crate::skip_reason::SkipReason;

    #[test]
    fn a_norm_is_compared_with_those_before() {
        let mut rule = Live::from(SkipSteps {
            z: 2.0,
            window: 4,
            ..SkipSteps::default()
        });
        for norm in [1.0, 3.0] {
            assert_eq!(rule.skips(1e9, None), None, "not active before two norms");
            step(&mut rule, norm, None);
        }
        // Mean 2, deviation sqrt(2): the limit is 4.83.
        assert_eq!(rule.skips(4.8, None), None);
        let too_large = Some(SkipReason::LargeNorm);
        assert_eq!(rule.skips(4.9, None), too_large);
        assert_eq!(rule.skips(f64::INFINITY, None), too_large);
    }

    #[test]
    fn a_loss_is_compared_with_those_before() {
        let mut rule = Live::from(SkipSteps {
            loss_z: 2.0,
            window: 4,
            ..SkipSteps::default()
        });
        for loss in [-3.0, -1.0] {
            assert_eq!(rule.skips(1.0, Some(1e9)), None);
            step(&mut rule, 1.0, Some(loss));
        }
        // Mean -2, deviation sqrt(2): the limit is 0.83.
        assert_eq!(rule.skips(1e9, Some(0.8)), None);
        assert_eq!(rule.skips(1e9, None), None);
        assert_eq!(rule.skips(1e9, Some(f64::NAN)), None);
        let too_large = Some(SkipReason::LargeLoss);
        assert_eq!(rule.skips(1.0, Some(0.9)), too_large);
    }

    #[test]
    fn a_fixed_limit_needs_no_window() {
        let rule = Live::from(SkipSteps {
            norm: 1.0,
            ..SkipSteps::default()
        });
        assert_eq!(rule.skips(1.0, None), None);
        assert_eq!(rule.skips(2.0, None), Some(SkipReason::LargeNorm));
    }

    #[test]
    fn what_was_saved_comes_back_without_zeros() {
        let mut rule = Live::from(SkipSteps::default());
        let saved = Saved::numbers(vec![2.0, 0.0, 4.0, 0.0, 1.0]);
        rule.load(&saved).unwrap();
        assert_eq!(rule.save().numbers, [1.0, 4.0, 0.0, 1.0]); // losses may be 0
        for bad in [&[3.0, 1.0][..], &[0.5], &[1.0, -1.0], &[0.0, f64::NAN], &[]] {
            rule.load(&Saved::numbers(bad.to_vec())).unwrap_err();
        }
    }
}
