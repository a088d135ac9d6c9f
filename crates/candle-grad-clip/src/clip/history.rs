//! Invariants of every rule with a history (`auto`, `quantile`, `zclip`, `adagc`, `skip`,
//! `stabilizer`). Without
//! them a rule could freeze a model without any error:
//!
//! 1. A norm of 0 enters no history, and no warm-up counts it ([`counts`]). It comes from a frozen
//!    phase, a masked batch or a loss of exactly 0, and says nothing about other steps.
//! 2. A limit from a history is never 0. Neither is the coefficient of a finite norm above 0
//!    ([`limit`]).
//! 3. A standard deviation has a lower bound ([`spread`], [`loss_spread`]). After a plateau of
//!    equal norms, rounding in the next norm does not make it an outlier.
//! 4. A history has a bounded length.

/// Lower bound of a deviation, relative to the mean. Norms and losses of minibatches spread more
/// widely. Equal ones that were computed in another order spread less.
pub(super) const LEAST_SPREAD: f64 = 1e-3;

/// Lower bound of the losses' deviation: about the rounding error of an f32 loss near 1. It matters
/// if the mean loss is close to 0.
const LEAST_LOSS_SPREAD: f64 = 1e-6;

/// Whether a norm may enter a history.
pub(super) fn counts(norm: f64) -> bool {
    norm > 0.0 && norm.is_finite()
}

/// The limit from a history, for a gradient of this norm. It is raised only if the limit or the
/// coefficient would be 0.
pub(super) fn limit(chosen: f64, norm: f64) -> f64 {
    let least_coef = f64::from_bits(1);
    let least = if counts(norm) { norm * least_coef } else { 0.0 };
    chosen.max(least).max(f64::MIN_POSITIVE)
}

/// The standard deviation of norms, with its lower bound.
pub(super) fn spread(deviation: f64, mean: f64) -> f64 {
    deviation.max(LEAST_SPREAD * mean.abs())
}

/// The standard deviation of losses, with its lower bound.
pub(super) fn loss_spread(deviation: f64, mean: f64) -> f64 {
    spread(deviation, mean).max(LEAST_LOSS_SPREAD)
}

/// The norms of a saved history that may enter a history.
pub(super) fn that_count(norms: &[f64]) -> impl Iterator<Item = f64> {
    norms.iter().copied().filter(|norm| counts(*norm))
}

/// Checks the norms of a saved history.
pub(super) fn check_norms(norms: &[f64]) -> Result<(), String> {
    let bad = norms
        .iter()
        .find(|norm| !(**norm >= 0.0 && norm.is_finite()));
    bad.map_or(Ok(()), |bad| {
        Err(format!("the clip's history has {bad}, expected norms"))
    })
}

#[cfg(test)]
mod tests {
    use super::{limit, loss_spread, spread};

    #[test]
    fn limits_and_spreads_are_never_zero_and_else_as_they_were() {
        assert_eq!(limit(2.5, 1e9), 2.5);
        assert_eq!(limit(f64::INFINITY, 1.0), f64::INFINITY);
        assert_eq!(limit(0.0, 0.0), f64::MIN_POSITIVE);
        assert_eq!(limit(2.5, f64::INFINITY), 2.5);
        for norm in [1e-300, 1.0, 1e300, f64::MAX] {
            assert!(limit(0.0, norm) / (norm + 1e-6) > 0.0, "{norm}");
            assert!(limit(1.0, norm) <= 1.0, "{norm}");
        }
        assert_eq!(spread(0.25, 2.0), 0.25);
        assert_eq!(spread(0.0, 2.0), 2e-3);
        assert_eq!(loss_spread(0.0, -2.0), 2e-3);
        assert_eq!(loss_spread(0.0, 0.0), 1e-6);
    }
}
