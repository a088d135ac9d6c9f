//! ZClip: clips norms that are many standard deviations above the running mean.
//!
//! Kumar, Owen, Chowdhury, Güra (2025), "ZClip: Adaptive spike mitigation for LLM pre-training",
//! arXiv 2504.02507, and the authors' PyTorch code, which this follows if the paper leaves a
//! choice.

use std::fmt;

use super::coef::TINY_COEF;
use super::decision::{Decision, Given};
use super::history;
use super::norm::clip_to;
use super::options::{Options, Writer};
use super::rule::{Limit, LimitKind, Method, Rule, Saved};
use crate::check::{check_decay, check_limit, check_not_negative};
use crate::error::{Error, Result};
use crate::skip_reason::SkipReason;

/// ZClip ([`Clip::zclip`](crate::Clip::zclip)): clips norms that are far above the running mean.
///
/// With the running mean `m` and variance `v` of the norms:
///
/// ```text
/// z = (total_norm - m) / (sqrt(v) + deviation_eps)            if z > z_thresh:
/// limit = clip_scale * (m + z_thresh^2 * sqrt(v) / z)         ZClipMode::ZScore
/// limit = m                                                   ZClipMode::Mean
/// limit = m + z_thresh * sqrt(v)       if total_norm > limit: ZClipMode::Percentile
/// g <- g * min(1, min(limit, max_norm) / (total_norm + 1e-6))
/// m <- alpha m + (1 - alpha) x                 x the limit if it was passed, else the norm
/// v <- alpha v + (1 - alpha) (x - m)^2         with the new m
/// ```
///
/// The first `warmup` norms give the first mean and (population) variance. Meanwhile only
/// `max_norm` applies. The 1e-6 is [`Clip::eps`](crate::Clip::eps).
///
/// Three departures from the authors' code, which clips to 0 for ever after zeros:
/// - A norm of 0 enters neither the statistics nor the warm-up.
/// - `sqrt(v)` counts as at least `0.001 m`, so that equal norms do not make the next one a spike.
/// - `max(warmup, 100)` norms in a row, each above a million times its limit, are a new level: the
///   statistics restart from them, with a warning.
///
/// # References
/// Kumar and others (2025), arXiv 2504.02507, and the authors' code: `z_thresh`; `max_grad_norm`,
/// `warmup_steps`, `clip_factor` and `skip_update_on_spike` there.
///
/// ```
/// use candle_grad_clip::{Clip, ZClip};
///
/// let clip = Clip::from(ZClip { z_thresh: 3.0, warmup: 50, ..ZClip::default() });
/// assert_eq!(clip.to_string(), "zclip:z_thresh=3,warmup=50");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ZClip {
    /// Decay of the mean and the variance, 0 to below 1. Default: 0.97.
    pub alpha: f64,
    /// The largest number of standard deviations above the mean. Default: 2.5.
    pub z_thresh: f64,
    /// Number of norms in the warm-up. Default: 25.
    pub warmup: usize,
    /// Added to the standard deviation in `z`. Default: 1e-6.
    pub deviation_eps: f64,
    /// A limit that always applies; infinite for none. Default: 1.
    pub max_norm: f64,
    /// The limit to which a spike is clipped. Default: [`ZClipMode::ZScore`].
    pub mode: ZClipMode,
    /// Factor of the limit of [`ZClipMode::ZScore`]. Default: 1.
    pub clip_scale: f64,
    /// Whether to skip a step with a spike instead of clipping it. Default: no.
    pub skip: bool,
}

/// The limit to which [`ZClip`] clips a spike.
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
    /// Smaller for larger spikes: `clip_scale * (m + z_thresh^2 * sqrt(v) / z)`.
    ZScore,
    /// The threshold of spikes: `m + z_thresh * sqrt(v)`.
    Percentile,
    /// The mean.
    Mean,
}

impl Default for ZClip {
    fn default() -> Self {
        Self {
            alpha: 0.97,
            z_thresh: 2.5,
            warmup: 25,
            deviation_eps: 1e-6,
            max_norm: 1.0,
            mode: ZClipMode::ZScore,
            clip_scale: 1.0,
            skip: false,
        }
    }
}

const MODES: &[(&str, ZClipMode)] = &[
    ("zscore", ZClipMode::ZScore),
    ("percentile", ZClipMode::Percentile),
    ("mean", ZClipMode::Mean),
];

impl Method for ZClip {
    fn parse(options: &mut Options<'_>) -> Result<Self> {
        let default = Self::default();
        Ok(Self {
            alpha: options.number("alpha", default.alpha)?,
            z_thresh: options.number("z_thresh", default.z_thresh)?,
            warmup: options.count("warmup", default.warmup)?,
            deviation_eps: options.number("deviation_eps", default.deviation_eps)?,
            max_norm: options.number("max_norm", default.max_norm)?,
            mode: options.word("mode", MODES, default.mode)?,
            clip_scale: options.number("clip_scale", default.clip_scale)?,
            skip: options
                .take("skip", "true or false")?
                .unwrap_or(default.skip),
        })
    }

    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let default = Self::default();
        out.option("alpha", self.alpha, default.alpha)?;
        out.option("z_thresh", self.z_thresh, default.z_thresh)?;
        out.option("warmup", self.warmup, default.warmup)?;
        out.option("deviation_eps", self.deviation_eps, default.deviation_eps)?;
        out.option("max_norm", self.max_norm, default.max_norm)?;
        out.word("mode", MODES, &self.mode, &default.mode)?;
        out.option("clip_scale", self.clip_scale, default.clip_scale)?;
        out.option("skip", self.skip, default.skip)
    }

    fn check(&self, _: f64) -> Result<()> {
        check_decay("alpha", self.alpha)?;
        check_limit("z_thresh", self.z_thresh)?;
        check_limit("max_norm", self.max_norm)?;
        check_limit("clip_scale", self.clip_scale)?;
        if self.warmup == 0 {
            return Err(Error::InvalidOption {
                name: "warmup",
                value: 0.0,
                expected: "1 step or more",
            });
        }
        check_not_negative("deviation_eps", self.deviation_eps)
    }

    fn start(&self) -> Box<dyn Rule> {
        Box::new(Live::from(*self))
    }

    fn limit(&mut self) -> Option<Limit<'_>> {
        Some((LimitKind::SideMaxNorm, "max_norm", &mut self.max_norm))
    }
}

impl ZClip {
    /// The limit for this norm, if it is a spike.
    fn spike_limit(&self, statistics: &Statistics, norm: f64) -> Option<f64> {
        let mean = statistics.mean;
        let deviation = history::spread(statistics.variance.sqrt(), mean);
        let chosen = |limit: f64| history::limit(limit.min(f64::MAX), norm);
        if self.mode == ZClipMode::Percentile {
            let limit = mean + self.z_thresh * deviation;
            return (norm > limit).then(|| chosen(limit));
        }
        let z = (norm - mean) / (deviation + self.deviation_eps);
        let limit = match self.mode {
            ZClipMode::Mean => mean,
            _ => self.clip_scale * (mean + self.z_thresh * deviation / (z / self.z_thresh)),
        };
        (z > self.z_thresh).then(|| chosen(limit))
    }

    /// Updates mean and variance with a norm.
    fn follow(&self, Statistics { mean, variance }: &mut Statistics, norm: f64) {
        *mean = history::limit(self.alpha * *mean + (1.0 - self.alpha) * norm, 0.0);
        let square = (norm - *mean).powi(2).min(f64::MAX);
        *variance = self.alpha * *variance + (1.0 - self.alpha) * square;
    }
}

/// The running rule.
#[derive(Debug, Default)]
struct Live {
    config: ZClip,
    statistics: Option<Statistics>,
    /// The norms of the warm-up. After it, the current run of norms above a million times their
    /// limit.
    warmup: Vec<f64>,
    observed: Option<Observed>,
}

/// What this step adds to the history.
#[derive(Debug, PartialEq)]
enum Observed {
    /// The norm, or the limit of a spike.
    Norm(f64),
    /// A norm above a million times its limit.
    Beyond { norm: f64, limit: f64 },
}

impl From<ZClip> for Live {
    fn from(config: ZClip) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }
}

impl Rule for Live {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        let norm = given.norm_that_counts();
        self.observed = norm.map(Observed::Norm);
        let mut max_norm = self.config.max_norm;
        if let (Some(norm), Some(statistics)) = (norm, &self.statistics)
            && let Some(limit) = self.config.spike_limit(statistics, norm)
        {
            if self.config.skip {
                return Decision::skip(SkipReason::LargeNorm);
            }
            max_norm = limit.min(max_norm);
            self.observed = Some(if limit < TINY_COEF * norm {
                Observed::Beyond { norm, limit }
            } else {
                Observed::Norm(limit)
            });
        }
        clip_to(max_norm, given)
    }

    fn observe(&mut self) {
        match self.observed.take() {
            Some(Observed::Norm(norm)) => self.observe_norm(norm),
            Some(Observed::Beyond { norm, limit }) => self.observe_beyond(norm, limit),
            None => {}
        }
    }

    fn set_limit(&mut self, value: f64) {
        self.config.max_norm = value;
    }

    /// Mean, variance (a mean of 0 means none yet), and the norms of the warm-up.
    fn save(&self) -> Saved {
        if self.statistics.is_none() && self.warmup.is_empty() {
            return Saved::default();
        }
        let Statistics { mean, variance } = self.statistics.unwrap_or_default();
        Saved::numbers([&[mean, variance], &self.warmup[..]].concat())
    }

    fn load(&mut self, saved: &Saved) -> std::result::Result<(), String> {
        let numbers = saved.only_numbers()?;
        history::check_norms(numbers)?;
        let &[mean, variance, ref warmup @ ..] = numbers else {
            return Err("the clip's history has one number, expected two or more".to_string());
        };
        self.statistics = history::counts(mean).then_some(Statistics { mean, variance });
        self.warmup = history::that_count(warmup).collect();
        Ok(())
    }
}

impl Live {
    fn observe_norm(&mut self, norm: f64) {
        if let Some(statistics) = &mut self.statistics {
            self.warmup.clear(); // ends the run of norms far above their limit
            self.config.follow(statistics, norm);
            return;
        }
        self.warmup.push(norm);
        if self.warmup.len() >= self.config.warmup {
            self.statistics = Some(Statistics::of(&std::mem::take(&mut self.warmup)));
        }
    }

    /// For a norm far above its limit. A long run of them is a new level and not a spike: the
    /// statistics restart.
    fn observe_beyond(&mut self, norm: f64, limit: f64) {
        let Some(statistics) = &mut self.statistics else {
            return;
        };
        self.warmup.push(norm);
        let new_level = self.config.warmup.max(NEW_LEVEL);
        if self.warmup.len() >= new_level {
            *statistics = Statistics::of(&std::mem::take(&mut self.warmup));
            tracing::warn!(
                norms = new_level,
                mean = statistics.mean,
                "zclip restarts: that many norms in a row were above a million times their limit"
            );
            return;
        }
        self.config.follow(statistics, limit);
    }
}

/// The shortest run of norms far above their limit that is a new level.
const NEW_LEVEL: usize = 100;

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Statistics {
    mean: f64,
    variance: f64,
}

impl Statistics {
    /// Finite also for norms near f64's maximum, as checkpoints hold only finite numbers.
    fn of(norms: &[f64]) -> Self {
        let mean = norms.iter().sum::<f64>().min(f64::MAX) / norms.len() as f64;
        let squares = norms.iter().map(|norm| (norm - mean).powi(2));
        let variance = squares.sum::<f64>().min(f64::MAX) / norms.len() as f64;
        Self { mean, variance }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::clip::decision::Action;
    use crate::clip::testing::{decide, step};

    const CONFIG: ZClip = ZClip {
        alpha: 0.5,
        z_thresh: 2.0,
        warmup: 2,
        deviation_eps: 0.0,
        max_norm: f64::INFINITY,
        mode: ZClipMode::ZScore,
        clip_scale: 1.0,
        skip: false,
    };

    fn after_warmup(config: ZClip) -> Live {
        let mut rule = Live::from(config);
        for norm in [0.5, 1.5] {
            assert!(!step(&mut rule, norm, None).was_clipped);
        }
        rule
    }

    #[test]
    fn the_modes_by_hand() {
        // Mean 1, deviation 0.5.
        for (mode, limit) in [
            (ZClipMode::ZScore, 1.5), // z = 4: 1 + 2 * 0.5 / (4 / 2)
            (ZClipMode::Mean, 1.0),
            (ZClipMode::Percentile, 2.0),
        ] {
            let config = ZClip { mode, ..CONFIG };
            let mut rule = after_warmup(config);
            let decision = decide(&mut rule, 3.0, None);
            assert!((decision.clipped_norm - limit).abs() < 1e-6);
            assert_eq!(rule.observed, Some(Observed::Norm(limit)));
            assert!(!decide(&mut rule, 1.9, None).was_clipped);
            assert_eq!(rule.observed, Some(Observed::Norm(1.9)));
            let mut rule = after_warmup(ZClip {
                skip: true,
                ..config
            });
            let decision = decide(&mut rule, 3.0, None);
            assert_eq!(decision.action, Action::Skip(SkipReason::LargeNorm));
        }
    }

    #[test]
    fn the_mean_and_variance_follow() {
        let mut rule = after_warmup(CONFIG);
        rule.observe_norm(2.0); // mean 1.5, variance 0.25 / 2 + 0.25 / 2
        let right = Statistics {
            mean: 1.5,
            variance: 0.25,
        };
        assert_eq!(rule.statistics, Some(right));
        assert!(rule.warmup.is_empty());
        let mut resumed = Live::from(CONFIG);
        resumed.load(&rule.save()).unwrap();
        assert_eq!(resumed.statistics, Some(right));
    }

    #[test]
    fn a_mean_of_zero_is_none() {
        let mut rule = Live::from(CONFIG);
        rule.load(&Saved::numbers(vec![0.0, 0.0, 0.0, 1.0]))
            .unwrap();
        assert_eq!((rule.statistics, &rule.warmup[..]), (None, &[1.0][..]));
    }
}
