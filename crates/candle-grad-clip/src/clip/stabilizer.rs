//! GradientStabilizer: keeps the direction of each Var's gradient, and takes its length from running
//! means of the norm.
//!
//! Huang, Wang, and others (2026), "GradientStabilizer: Fix the norm, not the gradient", arXiv
//! 2502.17055 v3. Earlier versions have the title "Stable-SPAM" and call this step `AdaGN`.

use std::fmt;

use super::coef::coef_to;
use super::decision::{Decision, Given};
use super::options::{Options, Writer};
use super::rule::{Method, Rule, Saved};
use super::{history, per_var};
use crate::check::check_decay;
use crate::error::Result;
use crate::gradients::Entry;

/// The longest gradient: no dtype overflows. The defaults stay below 1.5.
const MAX_LENGTH: f64 = 1e3;

/// The largest coefficient: f32 holds it.
const MAX_COEF: f64 = 1e30;

/// GradientStabilizer ([`Clip::stabilizer`](crate::Clip::stabilizer)): keeps the direction of each
/// Var's gradient, and replaces its norm `n_i` by a length from running means of `n_i` and `n_i^2`.
/// No limit has to be chosen.
///
/// ```text
/// m_i <- gamma1 m_i + (1 - gamma1) n_i           v_i <- gamma2 v_i + (1 - gamma2) n_i^2
/// g_i <- g_i / n_i * m_hat_i / (sqrt(v_hat_i) + eps)
/// m_hat_i = m_i / (1 - gamma1^t_i)               v_hat_i = v_i / (1 - gamma2^t_i)
/// ```
///
/// `t_i` counts the norms of the Var. `eps` is [`Clip::eps`](crate::Clip::eps), 1e-8 by default.
///
/// - A steady norm gives length 1, whatever its size. A spike, of any size, gives about
///   `(1 - gamma1) / sqrt(1 - gamma2)`: 0.95 with the defaults.
/// - **Small gradients are enlarged.** The coefficient is above 1 for a norm below the length;
///   reports show it.
/// - It suits optimizers that ignore the gradient's scale, such as Adam. With plain SGD every Var
///   moves by about the learning rate in each step, so another learning rate is needed, and the loss
///   does not settle unless that falls.
/// - After a spike the lengths are small, until `v` has forgotten it: those after a spike to `s`
///   times the norm recover within `2 ln(s) / ln(1 / gamma2)` steps. That is 44 steps for a factor
///   of 10.
///
/// A missing or all-zero gradient changes nothing. A coefficient is at most 1e30 and a length at most
/// 1000, so that no dtype overflows.
///
/// # References
/// Huang and others (2026), arXiv 2502.17055 v3; the decays are those of the authors' `StableSPAM`.
///
/// ```
/// use candle_grad_clip::{Clip, GradientStabilizer};
///
/// let clip = Clip::from(GradientStabilizer { gamma1: 0.8, ..GradientStabilizer::default() });
/// assert_eq!(clip.to_string(), "stabilizer:gamma1=0.8");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradientStabilizer {
    /// Decay of the means of the norms, 0 to below 1. Default: 0.7.
    pub gamma1: f64,
    /// Decay of the means of the squared norms, 0 to below 1. Default: 0.9.
    pub gamma2: f64,
}

impl Default for GradientStabilizer {
    fn default() -> Self {
        Self {
            gamma1: 0.7,
            gamma2: 0.9,
        }
    }
}

impl Method for GradientStabilizer {
    fn parse(options: &mut Options<'_>) -> Result<Self> {
        let default = Self::default();
        Ok(Self {
            gamma1: options.number("gamma1", default.gamma1)?,
            gamma2: options.number("gamma2", default.gamma2)?,
        })
    }

    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let default = Self::default();
        out.option("gamma1", self.gamma1, default.gamma1)?;
        out.option("gamma2", self.gamma2, default.gamma2)
    }

    fn default_eps(&self) -> f64 {
        1e-8
    }

    fn check(&self, _: f64) -> Result<()> {
        check_decay("gamma1", self.gamma1)?;
        check_decay("gamma2", self.gamma2)
    }

    fn sets_lengths(&self) -> bool {
        true
    }

    fn start(&self) -> Box<dyn Rule> {
        Box::new(Live::from(*self))
    }
}

/// The means of one Var's norms, with their bias corrected: `m_hat` and `sqrt(v_hat)`.
///
/// Corrected means stay right if a decay changes, and the root of `v` neither overflows nor
/// underflows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Means {
    mean: f64,
    root_mean_square: f64,
    /// The number of norms; 0 for none.
    count: f64,
}

impl Means {
    /// With one more norm. `m_hat <- (1 - w) m_hat + w n` with `w = (1 - gamma) / (1 - gamma^t)` is
    /// the bias-corrected mean.
    fn with(self, norm: f64, config: &GradientStabilizer) -> Self {
        let count = self.count + 1.0;
        let weight = |gamma: f64| (1.0 - gamma) / (1.0 - gamma.powf(count));
        let (w1, w2) = (weight(config.gamma1), weight(config.gamma2));
        let mean = (1.0 - w1) * self.mean + w1 * norm;
        let old = (1.0 - w2).max(0.0).sqrt() * self.root_mean_square;
        Self {
            mean: history::limit(mean, 0.0),
            root_mean_square: history::limit(old.hypot(w2.sqrt() * norm), 0.0),
            count,
        }
    }

    /// The length of the next gradient; 1 before the first norm.
    fn length(self, eps: f64) -> f64 {
        if self.count == 0.0 {
            return 1.0;
        }
        (self.mean / (self.root_mean_square + eps)).min(MAX_LENGTH)
    }

    fn save(self) -> Vec<f64> {
        match self.count {
            0.0 => Vec::new(),
            count => vec![self.mean, self.root_mean_square, count],
        }
    }

    fn load(saved: &[f64]) -> std::result::Result<Self, String> {
        match *saved {
            [] => Ok(Self::default()),
            [mean, root_mean_square, count]
                if saved.iter().copied().all(history::counts) && count >= 1.0 =>
            {
                Ok(Self {
                    mean,
                    root_mean_square,
                    count,
                })
            }
            _ => Err(format!(
                "the clip's history of a Var has {saved:?}, expected two means and a count, all above 0"
            )),
        }
    }
}

/// The running rule.
#[derive(Debug, Default)]
struct Live {
    config: GradientStabilizer,
    means: Vec<Means>,
    /// The means with this step's norms.
    next: Vec<Means>,
}

impl From<GradientStabilizer> for Live {
    fn from(config: GradientStabilizer) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }
}

impl Rule for Live {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        let (measured, zero_non_finite) = (given.measured, given.zero_non_finite);
        let norm_type = measured.norm_type;
        let is_finite = measured.total.stats.non_finite() == 0 || zero_non_finite;
        self.next.clear();
        self.next.extend_from_slice(&self.means);
        self.next.resize(measured.entries.len(), Means::default());
        let of_var = |(entry, means): (&Entry<'_>, &mut Means)| {
            let stats = entry.measured.stats;
            let norm = stats.power.root(norm_type).value();
            if entry.grad.is_none() || (norm == 0.0 && stats.non_finite() == 0) {
                return 1.0;
            }
            if is_finite && history::counts(norm) {
                *means = means.with(norm, &self.config);
            }
            let length = means.length(given.eps);
            let coef = coef_to(stats, norm_type, length, 0.0, zero_non_finite);
            if stats.non_finite() == 0 || zero_non_finite {
                coef.clamp(f64::from_bits(1), MAX_COEF)
            } else {
                coef
            }
        };
        let entries = measured.entries.iter().zip(&mut self.next);
        let coefs = entries.map(of_var).collect();
        per_var::scale(given, coefs)
    }

    fn observe(&mut self) {
        std::mem::swap(&mut self.means, &mut self.next);
    }

    /// The means of each Var, and their count.
    fn save(&self) -> Saved {
        Saved {
            numbers: Vec::new(),
            of_vars: self.means.iter().map(|means| means.save()).collect(),
        }
    }

    fn load(&mut self, saved: &Saved) -> std::result::Result<(), String> {
        if !saved.numbers.is_empty() {
            return Err("the clip's history has numbers of no Var, expected none".to_string());
        }
        let means = saved.of_vars.iter().map(|numbers| Means::load(numbers));
        self.means = means.collect::<std::result::Result<_, _>>()?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{GradientStabilizer, Live, Rule, Saved};
    use crate::clip::testing::{decide, given, measured, step};

    #[test]
    fn two_steps_by_hand() {
        let mut rule = Live::from(GradientStabilizer {
            gamma1: 0.5,
            gamma2: 0.75,
        });
        // The first norm of each Var becomes 1.
        let first = measured(&[&[3.0, 4.0], &[0.1]]);
        let decision = rule.decide(&given(&first.of(), 0.0));
        assert!((decision.clip_coef - 0.2).abs() < 1e-15);
        assert!((decision.clipped_norm - 2f64.sqrt()).abs() < 1e-15);
        rule.observe();
        // m = 2.5 / 0.5, then (1.25 + 6.25) / 0.75; v = 6.25 / 0.25, then (4.6875 + 39.0625) / 0.4375.
        let second = measured(&[&[12.5], &[0.0]]);
        let decision = rule.decide(&given(&second.of(), 0.0));
        assert!((decision.clip_coef - 1.0 / 12.5).abs() < 1e-15); // 10 / sqrt(100)
    }

    #[test]
    fn zeros_stay_zeros_and_enter_no_mean() {
        let mut rule = Live::from(GradientStabilizer::default());
        step(&mut rule, 5.0, None);
        let before = rule.means.clone();
        let decision = step(&mut rule, 0.0, None);
        assert_eq!((decision.clip_coef, decision.clipped_norm), (1.0, 0.0));
        assert_eq!(rule.means, before);
    }

    #[test]
    fn a_spike_has_a_bounded_length_whatever_its_size() {
        for spike in [1e3, 1e9, 1e150, 1e300] {
            let mut rule = Live::from(GradientStabilizer::default());
            for _ in 0..100 {
                step(&mut rule, 1.0, None);
            }
            let length = decide(&mut rule, spike, None).clipped_norm;
            assert!((length - 0.3 / 0.1f64.sqrt()).abs() < 1e-2, "{length}");
        }
    }

    #[test]
    fn coefficients_are_never_zero_or_infinite() {
        for norm in [5e-324, 1e-310, 1e-40, 1e300, f64::MAX] {
            let mut rule = Live::from(GradientStabilizer::default());
            for before in [f64::MAX, norm, 5e-324] {
                step(&mut rule, before, None);
            }
            let coef = decide(&mut rule, norm, None).clip_coef;
            assert!(coef > 0.0 && coef <= 1e30, "{norm}: {coef}");
        }
    }

    #[test]
    fn what_was_saved_comes_back() {
        let mut rule = Live::from(GradientStabilizer::default());
        step(&mut rule, 5.0, None);
        step(&mut rule, 7.0, None);
        let saved = rule.save();
        let mut other = Live::from(GradientStabilizer::default());
        other.load(&saved).unwrap();
        assert_eq!(other.means, rule.means);
        for bad in [
            vec![1.0],
            vec![1.0, 1.0, 0.0],
            vec![1.0, f64::NAN, 2.0],
            vec![-1.0, 1.0, 2.0],
        ] {
            let bad = Saved {
                numbers: Vec::new(),
                of_vars: vec![bad],
            };
            other.load(&bad).unwrap_err();
            assert_eq!(other.means, rule.means);
        }
    }
}
