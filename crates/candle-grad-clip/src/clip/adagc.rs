//! AdaGC: each Var's norm is limited to a little above its own running mean.
//!
//! Wang, Li, and others (2025), "AdaGC: Improving training stability for large language model pretraining", arXiv
//! 2502.11034, algorithm 1.

use super::per_var::{self, smaller};
use super::{Clip, Decision, Observed, clip_coef, history};
use crate::check::{check_decay, check_limit};
use crate::error::Result;
use crate::gradients::{Entry, Measurements};

/// AdaGC, of [`Clip::adagc`]: each Var's norm is limited to a little above its own running mean `c_i`.
///
/// ```text
/// in the first `warmup` steps:  h   = min(1, lambda_abs / total_norm)               c_i <- min(c_i, |h g_i|)
/// after them:                   h_i = min(1, lambda_rel * c_i / |g_i|)              c_i <- beta c_i + (1 - beta) |h_i g_i|
/// g_i <- h_i g_i
/// ```
///
/// The first gradient of a Var sets `c_i` to its clipped norm. A gradient of zeros, or none, leaves `c_i` alone (a departure:
/// in the paper a Var with one would stay at zero for ever), and the warm-up does not count a step in which all are so.
///
/// From a `c_i` that is far too low (after norms that were tiny) it rises by the factor `beta + (1 - beta) lambda_rel` a step, 1.001
/// with the defaults.
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
    /// How far above its mean a Var's norm may be. Default: 1.05. With 1 or less a mean can never rise.
    pub lambda_rel: f64,
    /// How much of a Var's mean stays in a step, 0 to below 1. Default: 0.98.
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

impl From<AdaGc> for Clip {
    fn from(rule: AdaGc) -> Self {
        Self::new(super::Method::AdaGc(rule))
    }
}

impl AdaGc {
    pub(super) fn check(&self) -> Result<()> {
        check_limit("lambda_abs", self.lambda_abs)?;
        check_limit("lambda_rel", self.lambda_rel)?;
        check_decay("beta", self.beta)
    }

    pub(super) fn decide(
        &self,
        state: &State,
        measured: &Measurements<'_>,
        eps: f64,
        zero_non_finite: bool,
    ) -> Decision {
        let norm_type = measured.norm_type;
        let coef = |stats, max_norm| clip_coef(stats, norm_type, max_norm, eps, zero_non_finite);
        let common = coef(measured.total.stats, self.lambda_abs);
        let of_var = |(index, entry): (usize, &Entry<'_>)| {
            let mean = state.means.get(index).copied().flatten();
            match (entry.grad, mean) {
                (None, _) => 1.0,
                (Some(_), Some(mean)) if state.steps >= self.warmup => {
                    let norm = entry.measured.stats.power.root(norm_type).value();
                    coef(
                        entry.measured.stats,
                        history::limit(self.lambda_rel * mean, norm),
                    )
                }
                _ => smaller(common, 1.0),
            }
        };
        let coefs: Vec<f64> = measured.entries.iter().enumerate().map(of_var).collect();
        let clean = measured.total.stats.non_finite() == 0 || zero_non_finite;
        let clipped = |(entry, coef): (&Entry<'_>, &f64)| {
            let norm = entry.measured.stats.power.root(norm_type).scaled(*coef);
            (entry.grad.is_some() && history::counts(norm)).then_some(norm)
        };
        let observed = if clean {
            Observed::ParamNorms(measured.entries.iter().zip(&coefs).map(clipped).collect())
        } else {
            Observed::Nothing
        };
        Decision {
            observed,
            ..per_var::scale(measured, coefs, zero_non_finite)
        }
    }

    pub(super) fn observe(&self, state: &mut State, clipped: &[Option<f64>]) {
        state.means.resize(clipped.len(), None);
        for (mean, clipped) in state.means.iter_mut().zip(clipped) {
            let Some(norm) = *clipped else { continue };
            *mean = Some(match *mean {
                None => norm,
                Some(mean) if state.steps < self.warmup => mean.min(norm),
                Some(mean) => {
                    let next = self.beta * mean + (1.0 - self.beta) * norm;
                    history::limit(next, 0.0)
                }
            });
        }
        // Not for a step in which there was nothing to clip.
        if clipped.iter().any(Option::is_some) {
            state.steps += 1;
        }
    }
}

/// The mean of each Var's norm, once it had a gradient.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct State {
    pub(super) means: Vec<Option<f64>>,
    /// Steps taken.
    pub(super) steps: u64,
}

impl State {
    /// What is left of a history of other settings, or of a file.
    pub(super) fn adapt(&mut self) {
        for mean in &mut self.means {
            *mean = mean.filter(|mean| history::counts(*mean));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{AdaGc, Observed, State};
    use crate::clip::tests::measured;

    #[test]
    fn two_steps_by_hand() {
        let rule = AdaGc {
            lambda_abs: 2.5,
            lambda_rel: 2.0,
            beta: 0.5,
            warmup: 1,
        };
        let mut state = State::default();
        // Norms 3 and 4 of 5 in all: h = 0.5.
        let first = measured(&[&[3.0], &[4.0]]);
        let decision = rule.decide(&state, &first.of(), 0.0, false);
        assert_eq!(decision.clip_coef, 0.5);
        let Observed::ParamNorms(norms) = &decision.observed else {
            panic!("{decision:?}")
        };
        rule.observe(&mut state, norms);
        assert_eq!(state.means, [Some(1.5), Some(2.0)]);
        // Limits 3 and 4: only the first is clipped, to 0.25.
        let second = measured(&[&[12.0], &[1.0]]);
        let decision = rule.decide(&state, &second.of(), 0.0, false);
        assert_eq!(decision.clip_coef, 0.25);
        let Observed::ParamNorms(norms) = &decision.observed else {
            panic!("{decision:?}")
        };
        assert_eq!(norms, &[Some(3.0), Some(1.0)]);
        rule.observe(&mut state, norms);
        assert_eq!(state.means, [Some(2.25), Some(1.5)]);
    }
}
