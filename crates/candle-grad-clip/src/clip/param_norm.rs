//! Clip by the norm of each Var: `g_i * min(1, max_norm / (param_norm_i + eps))`.
//!
//! Keras' `clipnorm` (3.10), burn's `GradientClipping::Norm`; `optax.clip_by_block_rms` without the mean.

use super::{Decision, per_var};
use crate::gradients::Measurements;

pub(super) fn decide(
    measured: &Measurements<'_>,
    max_norm: f64,
    eps: f64,
    zero_non_finite: bool,
) -> Decision {
    per_var::decide(measured, |_| (max_norm, eps), zero_non_finite)
}

#[cfg(test)]
mod tests {
    use crate::clip::tests::measured;

    #[test]
    fn each_var_has_its_own_limit() {
        // Norms 5 and 0.5: only the first is above 1.
        let measured = measured(&[&[3.0, 4.0], &[0.3, 0.4]]);
        let decision = super::decide(&measured.of(), 1.0, 0.0, false);
        assert!((decision.clip_coef - 0.2).abs() < 1e-15);
        assert!((decision.clipped_norm - 1.25f64.sqrt()).abs() < 1e-15);
        assert!(!super::decide(&measured.of(), 5.0, 0.0, false).was_clipped);
    }
}
