//! AdaGC: limits each Var's gradient norm to slightly above its running mean.
//!
//! Wang, Li, and others (2025), "AdaGC: Improving training stability for large language model
//! pretraining", arXiv 2502.11034, algorithm 1.

use std::fmt;

use super::coef::smaller;
use super::decision::{Decision, Given};
use super::options::{Options, Writer};
use super::rule::{Method, Rule, Saved};
use super::{history, per_var};
use crate::check::{check_decay, check_limit};
use crate::error::Result;
use crate::gradients::Entry;

/// AdaGC ([`Clip::adagc`](crate::Clip::adagc)): limits each Var's gradient norm to slightly above
/// its running mean `c_i`.
///
/// ```text
/// in the first `warmup` steps:  h   = min(1, lambda_abs / total_norm)               c_i <- min(c_i, |h g_i|)
/// after them:                   h_i = min(1, lambda_rel * c_i / |g_i|)              c_i <- beta c_i + (1 - beta) |h_i g_i|
/// g_i <- h_i g_i
/// ```
///
/// A Var's first gradient sets `c_i` to its clipped norm. A missing or all-zero gradient does not
/// change `c_i`, and the warm-up does not count a step without any other gradients. (A departure:
/// in the paper a Var with a zero gradient stays at zero for ever.)
///
/// If `c_i` is far too low (after very small norms), it rises by the factor `beta + (1 - beta)
/// lambda_rel` per step: 1.001 with the defaults.
///
/// # References
/// Wang and others (2025), arXiv 2502.11034.
///
/// ```
/// use candle_grad_clip::{AdaGc, Clip};
///
/// let clip = Clip::from(AdaGc { beta: 0.99, ..AdaGc::default() });
/// assert_eq!(clip.to_string(), "adagc:beta=0.99");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdaGc {
    /// The limit of the global norm in the warm-up. Default: 1.
    pub lambda_abs: f64,
    /// A Var's limit, relative to its mean. Default: 1.05. With 1 or less the mean can never rise.
    pub lambda_rel: f64,
    /// Decay of the means, 0 to below 1. Default: 0.98.
    pub beta: f64,
    /// Steps of the warm-up. Default: 100.
    pub warmup: u64,
}

impl Default for AdaGc {
    fn default() -> Self {
        Self {
            lambda_abs: 1.0,
            lambda_rel: 1.05,
            beta: 0.98,
            warmup: 100,
        }
    }
}

impl Method for AdaGc {
    fn parse(options: &mut Options<'_>) -> Result<Self> {
        let default = Self::default();
        Ok(Self {
            lambda_abs: options.number("lambda_abs", default.lambda_abs)?,
            lambda_rel: options.number("lambda_rel", default.lambda_rel)?,
            beta: options.number("beta", default.beta)?,
            warmup: options.count("warmup", default.warmup)?,
        })
    }

    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let default = Self::default();
        out.option("lambda_abs", self.lambda_abs, default.lambda_abs)?;
        out.option("lambda_rel", self.lambda_rel, default.lambda_rel)?;
        out.option("beta", self.beta, default.beta)?;
        out.option("warmup", self.warmup, default.warmup)
    }

    fn default_eps(&self) -> f64 {
        0.0
    }

    fn check(&self, _: f64) -> Result<()> {
        check_limit("lambda_abs", self.lambda_abs)?;
        check_limit("lambda_rel", self.lambda_rel)?;
        check_decay("beta", self.beta)
    }

    fn start(&self) -> Box<dyn Rule> {
        Box::new(Live::from(*self))
    }
}

/// The running rule.
#[derive(Debug, Default)]
struct Live {
    config: AdaGc,
    /// The mean of each Var's norm; `None` before its first gradient.
    means: Vec<Option<f64>>,
    /// Steps taken.
    steps: u64,
    /// This step's clipped norm of each Var, if it has one; empty if the global norm is not finite.
    clipped: Vec<Option<f64>>,
}

impl From<AdaGc> for Live {
    fn from(config: AdaGc) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }
}

impl Rule for Live {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        let (measured, config) = (given.measured, &self.config);
        let norm_type = measured.norm_type;
        let common = given.clip_coef(measured.total.stats, config.lambda_abs);
        let of_var = |(index, entry): (usize, &Entry<'_>)| {
            let mean = self.means.get(index).copied().flatten();
            match (entry.grad, mean) {
                (None, _) => 1.0,
                (Some(_), Some(mean)) if self.steps >= config.warmup => {
                    let stats = entry.measured.stats;
                    let norm = stats.power.root(norm_type).value();
                    given.clip_coef(stats, history::limit(config.lambda_rel * mean, norm))
                }
                _ => smaller(common, 1.0),
            }
        };
        let coefs: Vec<f64> = measured.entries.iter().enumerate().map(of_var).collect();
        self.clipped.clear();
        if measured.total.stats.non_finite() == 0 || given.zero_non_finite {
            let clipped = |(entry, coef): (&Entry<'_>, &f64)| {
                let norm = entry.measured.stats.power.root(norm_type).scaled(*coef);
                (entry.grad.is_some() && history::counts(norm)).then_some(norm)
            };
            let entries = measured.entries.iter().zip(&coefs);
            self.clipped.extend(entries.map(clipped));
        }
        per_var::scale(given, coefs)
    }

    fn observe(&mut self) {
        let AdaGc { beta, warmup, .. } = self.config;
        if self.means.len() < self.clipped.len() {
            self.means.resize(self.clipped.len(), None);
        }
        for (mean, clipped) in self.means.iter_mut().zip(&self.clipped) {
            let Some(norm) = *clipped else { continue };
            *mean = Some(match *mean {
                None => norm,
                Some(mean) if self.steps < warmup => mean.min(norm),
                Some(mean) => history::limit(beta * mean + (1.0 - beta) * norm, 0.0),
            });
        }
        // A step in which all norms are 0 does not count.
        if self.clipped.iter().any(Option::is_some) {
            self.steps = self.steps.saturating_add(1);
        }
        self.clipped.clear();
    }

    /// The steps, and the mean of each Var.
    fn save(&self) -> Saved {
        if self.steps == 0 {
            return Saved::default();
        }
        Saved {
            numbers: vec![self.steps as f64],
            of_vars: self
                .means
                .iter()
                .map(|mean| mean.iter().copied().collect())
                .collect(),
        }
    }

    fn load(&mut self, saved: &Saved) -> std::result::Result<(), String> {
        for of_var in &saved.of_vars {
            history::check_norms(of_var)?;
        }
        let [steps] = saved.numbers[..] else {
            return Err("the clip's history has means without a count of steps".to_string());
        };
        if !(steps >= 0.0 && steps.is_finite()) {
            return Err(format!("the clip's history has {steps}, expected steps"));
        }
        self.steps = steps as u64;
        let mean = |of_var: &Vec<f64>| history::that_count(of_var).next();
        self.means = saved.of_vars.iter().map(mean).collect();
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{AdaGc, Live, Rule, Saved};
    use crate::clip::testing::{given, measured};

    #[test]
    fn two_steps_by_hand() {
        let mut rule = Live::from(AdaGc {
            lambda_abs: 2.5,
            lambda_rel: 2.0,
            beta: 0.5,
            warmup: 1,
        });
        // Norms 3 and 4 of 5 in all: h = 0.5.
        let first = measured(&[&[3.0], &[4.0]]);
        let decision = rule.decide(&given(&first.of(), 0.0));
        assert_eq!(decision.clip_coef, 0.5);
        rule.observe();
        assert_eq!(rule.means, [Some(1.5), Some(2.0)]);
        // Limits 3 and 4: only the first is clipped, to 0.25.
        let second = measured(&[&[12.0], &[1.0]]);
        let decision = rule.decide(&given(&second.of(), 0.0));
        assert_eq!(decision.clip_coef, 0.25);
        assert_eq!(rule.clipped, [Some(3.0), Some(1.0)]);
        rule.observe();
        assert_eq!(rule.means, [Some(2.25), Some(1.5)]);
    }

    #[test]
    fn what_was_saved_comes_back_without_zeros() {
        let mut rule = Live::from(AdaGc::default());
        let mut saved = Saved {
            numbers: vec![7.0],
            of_vars: vec![vec![], vec![2.0], vec![]],
        };
        rule.load(&saved).unwrap();
        assert_eq!(
            (&rule.means[..], rule.steps),
            (&[None, Some(2.0), None][..], 7)
        );
        assert_eq!(rule.save(), saved);
        saved.of_vars[0] = vec![-1.0];
        rule.load(&saved).unwrap_err();
        saved = Saved::numbers(vec![f64::NAN]);
        rule.load(&saved).unwrap_err();
    }
}
