//! Clip by the root mean square of each Var: `g_i * min(1, max_rms / (rms_i + eps))`, with
//! `rms_i = (sum |g|^p / n_i)^(1/p)` over its `n_i` elements.
//!
//! `optax.clip_by_block_rms` (optax 0.2.8), which has no eps; Adafactor (Shazeer, Stern, 2018) clips its updates so.

use candle_grad_clip_kernels::NormType;

use super::{Decision, per_var};
use crate::gradients::{Entry, Measurements};

pub(super) fn decide(
    measured: &Measurements<'_>,
    max_rms: f64,
    eps: f64,
    zero_non_finite: bool,
) -> Decision {
    // The rms is the norm divided by this, so the limit of the norm is the rms' times this.
    let root = |elements: f64| match measured.norm_type {
        NormType::L1 => elements,
        NormType::L2 => elements.sqrt(),
        NormType::Inf => 1.0,
        NormType::P(p) => elements.powf(p.recip()),
    };
    let limit = |entry: &Entry<'_>| {
        let root = root(entry.elements.max(1) as f64);
        (max_rms * root, eps * root)
    };
    per_var::decide(measured, limit, zero_non_finite)
}

#[cfg(test)]
mod tests {
    use crate::clip::tests::measured;

    #[test]
    fn the_limit_is_that_of_the_mean_square() {
        // rms sqrt(25 / 4) = 2.5 and 0.5.
        let measured = measured(&[&[3.0, 4.0, 0.0, 0.0], &[0.5]]);
        let decision = super::decide(&measured.of(), 1.0, 0.0, false);
        assert!((decision.clip_coef - 0.4).abs() < 1e-15);
        assert!((decision.clipped_norm - 4.25f64.sqrt()).abs() < 1e-15);
        // 1 / (2.5 + 0.5)
        let decision = super::decide(&measured.of(), 1.0, 0.5, false);
        assert!((decision.clip_coef - 1.0 / 3.0).abs() < 1e-15);
    }
}
