//! Clip by global norm: `clip_coef = min(1, max_norm / (total_norm + eps))`.
//!
//! Pascanu, Mikolov, Bengio (2013), "On the difficulty of training recurrent neural networks",
//! algorithm 1; `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15), which added eps.

use candle_grad_clip_kernels::{NormType, Stats};

use super::Decision;
use crate::gradients::Measurements;

pub(super) fn decide(
    measured: &Measurements<'_>,
    max_norm: f64,
    eps: f64,
    zero_non_finite: bool,
) -> Decision {
    let stats = measured.total.stats;
    let coef = clip_coef(stats, measured.norm_type, max_norm, eps, zero_non_finite);
    Decision::scale(measured, coef, zero_non_finite)
}

/// The coefficient; under `Propagate` NaN for gradients with a NaN, 0 for those with an infinity.
pub(crate) fn clip_coef(
    stats: Stats,
    norm_type: NormType,
    max_norm: f64,
    eps: f64,
    zero_non_finite: bool,
) -> f64 {
    if max_norm == f64::INFINITY || zero_non_finite || stats.non_finite() == 0 {
        stats.power.root(norm_type).clip_coef(max_norm, eps)
    } else if stats.nan > 0 {
        f64::NAN
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use candle_grad_clip_kernels::{NormType, measure};

    use crate::measure::{GradStats, Measurements};

    fn of(values: &[f64]) -> Measurements<'static> {
        let stats = measure(values, NormType::L2);
        let total = GradStats {
            stats,
            ..GradStats::ZERO
        };
        Measurements {
            entries: Vec::new(),
            total,
            norm_type: NormType::L2,
            units: None,
            loss: None,
        }
    }

    #[test]
    fn the_norm_after_is_the_limit_and_clipping_again_changes_nothing() {
        let decision = super::decide(&of(&[3.0, 4.0]), 1.0, 0.0, false);
        assert!((decision.clip_coef - 0.2).abs() < 1e-15);
        assert!((decision.clipped_norm - 1.0).abs() < 1e-15);
        let again = super::decide(&of(&[0.6, 0.8]), 1.0, 0.0, false);
        assert!((again.clip_coef - 1.0).abs() < 1e-15);
    }

    #[test]
    fn a_norm_that_f64_cannot_hold_is_clipped_all_the_same() {
        let decision = super::decide(&of(&[f64::MAX; 9]), 6.0, 1e-6, false);
        assert!((decision.clipped_norm - 6.0).abs() < 1e-12, "{decision:?}");
    }

    #[test]
    fn an_infinite_limit_never_writes() {
        for values in [[0.0, 1.0], [f64::INFINITY, 1.0], [f64::NAN, 1.0]] {
            let decision = super::decide(&of(&values), f64::INFINITY, 1e-6, false);
            assert!(!decision.was_clipped);
        }
    }
}
