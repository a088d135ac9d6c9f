//! A coefficient for each Var, from its own norm: `g_i * min(1, max_norm_i / (param_norm_i +
//! eps))`.

use candle_grad_clip_kernels::{Edit, ScaledPowerSum};

use super::coef::{clip_coef, smaller};
use super::decision::{Decision, Given};
use super::edits::Edits;
use crate::gradients::Entry;

/// Clips each Var's gradient with the `max_norm` and `eps` that `limit` returns for it.
pub(super) fn clip_to(limit: impl Fn(&Entry<'_>) -> (f64, f64), given: &Given<'_>) -> Decision {
    let coef = |entry: &Entry<'_>| {
        let (stats, norm_type) = (entry.measured.stats, given.measured.norm_type);
        let (max_norm, eps) = limit(entry);
        clip_coef(stats, norm_type, max_norm, eps, given.zero_non_finite)
    };
    let coef = |entry: &Entry<'_>| entry.grad.map_or(1.0, |_| coef(entry));
    let coefs = given.measured.entries.iter().map(coef).collect();
    scale(given, coefs)
}

/// Multiplies each Var's gradient by its own coefficient.
pub(super) fn scale(given: &Given<'_>, coefs: Vec<f64>) -> Decision {
    let zero_non_finite = given.zero_non_finite;
    let was_clipped = coefs.iter().any(|coef| *coef != 1.0);
    let parts = given.measured.entries.iter().zip(&coefs);
    let parts = parts.filter(|(entry, _)| entry.grad.is_some());
    let clip_coef = parts.clone().map(|(_, coef)| *coef).reduce(smaller);
    let clip_coef = clip_coef.unwrap_or(1.0);
    let parts = parts.map(|(entry, coef)| (entry.measured.stats.power, *coef));
    let clipped_norm = scaled_norm(given, parts);
    let edits = (was_clipped || zero_non_finite).then(|| {
        let edit = |clip_coef| Edit::Scale {
            clip_coef,
            zero_non_finite,
        };
        Edits::PerVar(coefs.into_iter().map(edit).collect())
    });
    Decision {
        was_clipped,
        ..Decision::new(edits, clip_coef, clipped_norm)
    }
}

/// The norm of all parts, each scaled by its own coefficient.
pub(super) fn scaled_norm(
    given: &Given<'_>,
    parts: impl Iterator<Item = (ScaledPowerSum, f64)>,
) -> f64 {
    let measured = given.measured;
    if measured.total.stats.non_finite() > 0 && !given.zero_non_finite {
        return f64::NAN;
    }
    let mut all = ScaledPowerSum::ZERO;
    for (power, coef) in parts.filter(|(_, coef)| *coef > 0.0) {
        all = all.merge(scaled(power, coef), measured.norm_type);
    }
    all.root(measured.norm_type).value()
}

/// The power sum of elements after scaling by a coefficient.
pub(super) fn scaled(power: ScaledPowerSum, coef: f64) -> ScaledPowerSum {
    if coef == 0.0 {
        return ScaledPowerSum::ZERO;
    }
    ScaledPowerSum {
        scale: power.scale * coef,
        sum: power.sum,
    }
}
