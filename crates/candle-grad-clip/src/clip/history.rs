//! What holds for every rule with a history (`auto`, `quantile`, `zclip`, `adagc`, `skip`), so that
//! none of them freezes a model in silence:
//!
//! 1. A gradient of norm 0 enters no history, and no warm-up counts it ([`counts`]). There is
//!    nothing to clip in it: it comes from a frozen phase, a masked batch or a loss that is exactly
//!    0, and says nothing about the norms of other steps.
//! 2. A limit that a history chose is never 0, nor is the coefficient of a finite norm above 0
//!    ([`limit`]).
//! 3. A spread of 0 condemns no step ([`spread`], [`loss_spread`]): after a plateau of equal norms
//!    the next one is not an outlier because its last digit is another.
//! 4. A history has a bounded length.

/// The least share of the mean that a deviation counts as. Norms and losses of minibatches spread
/// more widely than that; equal ones that were computed in another order spread less.
pub(super) const LEAST_SPREAD: f64 = 1e-3;

/// The least deviation of losses: what rounding leaves of a loss near 1 in f32. It matters where
/// their mean is 0 or close to it.
const LEAST_LOSS_SPREAD: f64 = 1e-6;

/// Whether a norm may enter a history.
pub(super) fn counts(norm: f64) -> bool {
    norm > 0.0 && norm.is_finite()
}

/// The limit that a history chose, for a gradient of this norm. It is raised only where it, or the
/// coefficient, would be 0.
pub(super) fn limit(chosen: f64, norm: f64) -> f64 {
    let least_coef = f64::from_bits(1);
    let least = if counts(norm) { norm * least_coef } else { 0.0 };
    chosen.max(least).max(f64::MIN_POSITIVE)
}

/// The deviation of norms around their mean.
pub(super) fn spread(deviation: f64, mean: f64) -> f64 {
    deviation.max(LEAST_SPREAD * mean.abs())
}

/// The deviation of losses around their mean.
pub(super) fn loss_spread(deviation: f64, mean: f64) -> f64 {
    spread(deviation, mean).max(LEAST_LOSS_SPREAD)
}

/// Those of a history that was saved which may enter another.
pub(super) fn that_count(norms: &[f64]) -> impl Iterator<Item = f64> {
    norms.iter().copied().filter(|norm| counts(*norm))
}

/// Whether these can be norms of a history that was saved.
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
