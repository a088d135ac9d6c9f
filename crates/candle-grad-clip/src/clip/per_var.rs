//! A coefficient for each Var by its own norm: `g_i * min(1, max_norm_i / (param_norm_i + eps))`.

use candle_grad_clip_kernels::{Edit, ScaledPowerSum};

use super::{Action, Decision, Edits, Observed, clip_coef};
use crate::gradients::{Entry, Measurements};

/// Limits each Var's gradient by the `max_norm` and `eps` that `limit` gives for it.
pub(super) fn decide(
    measured: &Measurements<'_>,
    limit: impl Fn(&Entry<'_>) -> (f64, f64),
    zero_non_finite: bool,
) -> Decision {
    let coef = |entry: &Entry<'_>| {
        let (stats, norm_type) = (entry.measured.stats, measured.norm_type);
        let (max_norm, eps) = limit(entry);
        clip_coef(stats, norm_type, max_norm, eps, zero_non_finite)
    };
    let coef = |entry: &Entry<'_>| entry.grad.map_or(1.0, |_| coef(entry));
    let coefs = measured.entries.iter().map(coef).collect();
    scale(measured, coefs, zero_non_finite)
}

/// The smaller one, or NaN where one is.
pub(super) fn smaller(x: f64, y: f64) -> f64 {
    if x.is_nan() || x < y { x } else { y }
}

/// Multiplies each Var's gradient by its own coefficient.
pub(super) fn scale(
    measured: &Measurements<'_>,
    coefs: Vec<f64>,
    zero_non_finite: bool,
) -> Decision {
    let was_clipped = coefs.iter().any(|coef| *coef != 1.0);
    let clip_coef = coefs.iter().copied().fold(1.0, smaller);
    let parts = measured.entries.iter().zip(&coefs);
    let parts = parts.filter(|(entry, _)| entry.grad.is_some());
    let parts = parts.map(|(entry, coef)| (entry.measured.stats.power, *coef));
    let clipped_norm = scaled_norm(measured, parts, zero_non_finite);
    let action = if was_clipped || zero_non_finite {
        let edit = |clip_coef| Edit::Scale {
            clip_coef,
            zero_non_finite,
        };
        Action::Edit(Edits::PerVar(coefs.into_iter().map(edit).collect()))
    } else {
        Action::Leave
    };
    Decision {
        action,
        clip_coef,
        clipped_norm,
        was_clipped,
        num_clipped: 0,
        groups: Vec::new(),
        observed: Observed::Nothing,
    }
}

/// The norm of all parts, each scaled by its own coefficient.
pub(super) fn scaled_norm(
    measured: &Measurements<'_>,
    parts: impl Iterator<Item = (ScaledPowerSum, f64)>,
    zero_non_finite: bool,
) -> f64 {
    if measured.total.stats.non_finite() > 0 && !zero_non_finite {
        return f64::NAN;
    }
    let mut all = ScaledPowerSum::ZERO;
    for (power, coef) in parts.filter(|(_, coef)| *coef > 0.0) {
        let scaled = ScaledPowerSum {
            scale: power.scale * coef,
            sum: power.sum,
        };
        all = all.merge(scaled, measured.norm_type);
    }
    all.root(measured.norm_type).value()
}
