//! ZClip: clips norms that are far above the mean of those before, measured in standard deviations.
//!
//! Kumar, Owen, Chowdhury, Güra (2025), "ZClip: Adaptive spike mitigation for LLM pre-training", arXiv 2504.02507,
//! and the authors' PyTorch code, which this follows where the paper leaves a choice.

use super::{Clip, Observed, TINY_COEF, history};
use crate::check::{check_decay, check_limit, check_not_negative};
use crate::error::{Error, Result};

/// ZClip, of [`Clip::zclip`]: clips norms that are far above the mean of those before.
///
/// With the running mean `m` and variance `v` of the norms:
///
/// ```text
/// z = (total_norm - m) / (sqrt(v) + eps)                     if z > z_max:
/// limit = clip_scale * (m + z_max^2 * sqrt(v) / z)           ZClipMode::ZScore
/// limit = m                                                  ZClipMode::Mean
/// limit = m + z_max * sqrt(v)         if total_norm > limit: ZClipMode::Percentile
/// g <- g * min(1, min(limit, max_norm) / (total_norm + 1e-6))
/// m <- alpha m + (1 - alpha) x                 x the limit if it was passed, else the norm
/// v <- alpha v + (1 - alpha) (x - m)^2         with the new m
/// ```
///
/// The first `warmup` norms make the first mean and variance (of the population); meanwhile only `max_norm` holds.
/// (The last `eps` is [`Clip::eps`].) A gradient of norm 0 enters nothing, and the warm-up does not count it. `sqrt(v)` counts as at
/// least `0.001 m` in `z` and the limits, so that a plateau of equal norms makes no spike of the next. A row of `max(warmup, 100)` norms, each above a million times its limit, is a new level and no spike: they make
/// the mean and variance anew, with a warning. (These three are departures: the authors' code clips to 0 for ever after zeros.)
///
/// # References
/// Kumar and others (2025), arXiv 2504.02507, and the authors' code: `z_thresh`, `max_grad_norm`, `warmup_steps`,
/// `clip_factor` and `skip_update_on_spike` there.
///
/// ```
/// use candle_grad_clip::{Clip, ZClip};
///
/// let clip = Clip::from(ZClip { z: 3.0, warmup: 50, ..ZClip::default() });
/// assert_eq!(clip.to_string(), "zclip:z=3,warmup=50");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ZClip {
    /// How much of the mean and the variance stays in a step, 0 to below 1. Default: 0.97.
    pub alpha: f64,
    /// The largest number of standard deviations above the mean. Default: 2.5.
    pub z: f64,
    /// How many norms make the first mean and variance. Default: 25.
    pub warmup: usize,
    /// What is added to the standard deviation. Default: 1e-6.
    pub eps: f64,
    /// A limit that always holds; infinite for none. Default: 1.
    pub max_norm: f64,
    /// What a spike is clipped to. Default: [`ZClipMode::ZScore`].
    pub mode: ZClipMode,
    /// What the limit of [`ZClipMode::ZScore`] is multiplied by. Default: 1.
    pub clip_scale: f64,
    /// Whether a step with a spike is skipped, instead of clipped. Default: no.
    pub skip: bool,
}

/// What [`ZClip`] clips a spike to.
///
/// ```
/// use candle_grad_clip::{Clip, ZClip, ZClipMode};
///
/// let clip = Clip::from(ZClip { mode: ZClipMode::Mean, ..ZClip::default() });
/// assert_eq!(clip.to_string(), "zclip:mode=mean");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ZClipMode {
    /// The less, the larger it is: `clip_scale * (m + z_max^2 * sqrt(v) / z)`.
    ZScore,
    /// Where spikes begin: `m + z_max * sqrt(v)`.
    Percentile,
    /// The mean.
    Mean,
}

impl Default for ZClip {
    fn default() -> Self {
        Self {
            alpha: 0.97,
            z: 2.5,
            warmup: 25,
            eps: 1e-6,
            max_norm: 1.0,
            mode: ZClipMode::ZScore,
            clip_scale: 1.0,
            skip: false,
        }
    }
}

impl From<ZClip> for Clip {
    fn from(rule: ZClip) -> Self {
        Self::new(super::Method::ZClip(rule))
    }
}

/// What is to be done with a norm.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Verdict {
    Skip,
    Clip { max_norm: f64, observed: Observed },
}

impl ZClip {
    pub(super) fn check(&self) -> Result<()> {
        check_decay("alpha", self.alpha)?;
        check_limit("z", self.z)?;
        check_limit("max_norm", self.max_norm)?;
        check_limit("clip_scale", self.clip_scale)?;
        if self.warmup == 0 {
            return Err(Error::InvalidOption {
                name: "warmup",
                value: 0.0,
                expected: "1 step or more",
            });
        }
        check_not_negative("eps", self.eps)
    }

    pub(super) fn decide(&self, state: &State, norm: Option<f64>) -> Verdict {
        let fixed = |observed| Verdict::Clip {
            max_norm: self.max_norm,
            observed,
        };
        let (Some(norm), Some(statistics)) = (norm, &state.statistics) else {
            return fixed(Observed::norm(norm));
        };
        match self.limit(statistics, norm) {
            None => fixed(Observed::Norm(norm)),
            Some(_) if self.skip => Verdict::Skip,
            Some(limit) => Verdict::Clip {
                max_norm: limit.min(self.max_norm),
                observed: if limit < TINY_COEF * norm {
                    Observed::Beyond { norm, limit }
                } else {
                    Observed::Norm(limit)
                },
            },
        }
    }

    /// The limit of a norm that is too far above the mean.
    fn limit(&self, statistics: &Statistics, norm: f64) -> Option<f64> {
        let mean = statistics.mean;
        let deviation = history::spread(statistics.variance.sqrt(), mean);
        let chosen = |limit: f64| history::limit(limit.min(f64::MAX), norm);
        if self.mode == ZClipMode::Percentile {
            let limit = mean + self.z * deviation;
            return (norm > limit).then(|| chosen(limit));
        }
        let z = (norm - mean) / (deviation + self.eps);
        let limit = match self.mode {
            ZClipMode::Mean => mean,
            _ => self.clip_scale * (mean + self.z * deviation / (z / self.z)),
        };
        (z > self.z).then(|| chosen(limit))
    }

    pub(super) fn observe(&self, state: &mut State, norm: f64) {
        if let Some(statistics) = &mut state.statistics {
            state.warmup.clear(); // the row of norms beyond all measure ends
            self.follow(statistics, norm);
            return;
        }
        state.warmup.push(norm);
        if state.warmup.len() >= self.warmup {
            state.statistics = Some(Statistics::of(&std::mem::take(&mut state.warmup)));
        }
    }

    /// As [`ZClip::observe`], of a norm that was clipped to next to nothing: what lasts is no spike, and the statistics start anew.
    pub(super) fn observe_beyond(&self, state: &mut State, norm: f64, limit: f64) {
        let Some(statistics) = &mut state.statistics else {
            return;
        };
        state.warmup.push(norm);
        if state.warmup.len() >= self.warmup.max(NEW_LEVEL) {
            *statistics = Statistics::of(&std::mem::take(&mut state.warmup));
            tracing::warn!(
                norms = self.warmup.max(NEW_LEVEL),
                mean = statistics.mean,
                "zclip starts anew: so many norms in a row were above a million times its limit"
            );
            return;
        }
        self.follow(statistics, limit);
    }

    fn follow(&self, Statistics { mean, variance }: &mut Statistics, norm: f64) {
        *mean = history::limit(self.alpha * *mean + (1.0 - self.alpha) * norm, 0.0);
        let square = (norm - *mean).powi(2).min(f64::MAX);
        *variance = self.alpha * *variance + (1.0 - self.alpha) * square;
    }
}

/// How many norms in a row, at least, are a new level.
const NEW_LEVEL: usize = 100;

/// The norms of the warm-up, then their mean and variance. Beside those: the latest norms, if they were beyond all measure.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct State {
    pub(super) warmup: Vec<f64>,
    pub(super) statistics: Option<Statistics>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Statistics {
    pub(super) mean: f64,
    pub(super) variance: f64,
}

impl Statistics {
    /// No number that a checkpoint can't hold, also of norms near f64's maximum.
    fn of(norms: &[f64]) -> Self {
        let mean = norms.iter().sum::<f64>().min(f64::MAX) / norms.len() as f64;
        let squares = norms.iter().map(|norm| (norm - mean).powi(2));
        let variance = squares.sum::<f64>().min(f64::MAX) / norms.len() as f64;
        Self { mean, variance }
    }
}

impl State {
    /// What is left of a history of other settings, or of a file.
    pub(super) fn adapt(&mut self) {
        self.warmup.retain(|norm| history::counts(*norm));
        self.statistics = self.statistics.filter(|x| history::counts(x.mean));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: ZClip = ZClip {
        alpha: 0.5,
        z: 2.0,
        warmup: 2,
        eps: 0.0,
        max_norm: f64::INFINITY,
        mode: ZClipMode::ZScore,
        clip_scale: 1.0,
        skip: false,
    };

    fn after_warmup() -> State {
        let mut state = State::default();
        for norm in [0.5, 1.5] {
            let fixed = RULE.decide(&state, Some(norm));
            assert!(matches!(
                fixed,
                Verdict::Clip {
                    max_norm: f64::INFINITY,
                    ..
                }
            ));
            RULE.observe(&mut state, norm);
        }
        state
    }

    #[test]
    fn the_modes_by_hand() {
        let state = after_warmup(); // mean 1, deviation 0.5
        for (mode, limit) in [
            (ZClipMode::ZScore, 1.5), // z = 4: 1 + 2 * 0.5 / (4 / 2)
            (ZClipMode::Mean, 1.0),
            (ZClipMode::Percentile, 2.0),
        ] {
            let rule = ZClip { mode, ..RULE };
            let verdict = Verdict::Clip {
                max_norm: limit,
                observed: Observed::Norm(limit),
            };
            assert_eq!(rule.decide(&state, Some(3.0)), verdict);
            let rule = ZClip { skip: true, ..rule };
            assert_eq!(rule.decide(&state, Some(3.0)), Verdict::Skip);
            let below = Verdict::Clip {
                max_norm: f64::INFINITY,
                observed: Observed::Norm(1.9),
            };
            assert_eq!(rule.decide(&state, Some(1.9)), below);
        }
    }

    #[test]
    fn the_mean_and_variance_follow() {
        let mut state = after_warmup();
        RULE.observe(&mut state, 2.0); // mean 1.5, variance 0.25 / 2 + 0.25 / 2
        let right = Statistics {
            mean: 1.5,
            variance: 0.25,
        };
        assert_eq!(state.statistics, Some(right));
        assert!(state.warmup.is_empty());
    }
}
