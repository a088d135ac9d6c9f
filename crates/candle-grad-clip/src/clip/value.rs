//! Clip by value: every element into `[-clip_value, clip_value]`.
//!
//! `torch.nn.utils.clip_grad_value_` (PyTorch 2.15). The norm and the number of elements that change
//! come from the same read that measures the norm before.

use candle_grad_clip_kernels::Edit;

use super::{Action, Decision, Edits, Observed};
use crate::gradients::{Measurements, norm_of};

pub(super) fn decide(
    measured: &Measurements<'_>,
    clip_value: f64,
    zero_non_finite: bool,
) -> Decision {
    let total = measured.total;
    let action = if total.num_clipped == 0 && !zero_non_finite {
        Action::Leave
    } else {
        Action::Edit(Edits::All(Edit::Clamp {
            clip_value,
            clip_coef: 1.0,
            zero_non_finite,
        }))
    };
    Decision {
        action,
        clip_coef: 1.0,
        clipped_norm: norm_of(total.clamped, measured.norm_type),
        was_clipped: total.num_clipped > 0,
        num_clipped: total.num_clipped,
        groups: Vec::new(),
        observed: Observed::Nothing,
    }
}
