//! Clip coefficients from norms and limits.

use candle_grad_clip_kernels::{NormType, Stats};

/// `eps` of `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15).
pub(crate) const CLIP_EPS: f64 = 1e-6;

/// A coefficient below this almost removes the gradient.
pub(crate) const TINY_COEF: f64 = 1e-6;

/// The clip coefficient. Under `Propagate` it is NaN if there is a NaN, else 0 if there is an
/// infinity.
pub(crate) fn clip_coef(
    stats: Stats,
    norm_type: NormType,
    max_norm: f64,
    eps: f64,
    zero_non_finite: bool,
) -> f64 {
    if max_norm == f64::INFINITY {
        return 1.0;
    }
    smaller(
        coef_to(stats, norm_type, max_norm, eps, zero_non_finite),
        1.0,
    )
}

/// The coefficient that gives gradients the norm `length`; it may be above 1. NaN and 0 as for
/// [`clip_coef`].
pub(super) fn coef_to(
    stats: Stats,
    norm_type: NormType,
    length: f64,
    eps: f64,
    zero_non_finite: bool,
) -> f64 {
    if zero_non_finite || stats.non_finite() == 0 {
        stats.power.root(norm_type).coef_to(length, eps)
    } else if stats.nan > 0 {
        f64::NAN
    } else {
        0.0
    }
}

/// The smaller of both, or NaN if one is NaN.
pub(super) fn smaller(x: f64, y: f64) -> f64 {
    if x.is_nan() || x < y { x } else { y }
}
