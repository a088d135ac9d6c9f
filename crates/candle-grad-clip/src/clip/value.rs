//! Clip by value: clamps every element to `[-clip_value, clip_value]`.
//!
//! `torch.nn.utils.clip_grad_value_` (PyTorch 2.15). The norm after clipping and the number of
//! clipped elements come from the same read as the norm before.

use std::fmt;

use candle_grad_clip_kernels::Edit;

use super::decision::{Decision, Given};
use super::edits::Edits;
use super::options::{Options, Writer};
use super::rule::{Limit, LimitKind, Method, Rule, Scope};
use crate::check::check_limit;
use crate::error::Result;
use crate::gradients::norm_of;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Value {
    pub(super) clip_value: f64,
}

impl Method for Value {
    fn parse(options: &mut Options<'_>) -> Result<Self> {
        let clip_value = options.main("clip_value")?;
        Ok(Self { clip_value })
    }

    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        out.main(self.clip_value)
    }

    fn check(&self, _: f64) -> Result<()> {
        check_limit("clip_value", self.clip_value)
    }

    fn scope(&self) -> Scope {
        Scope::Elements {
            clip_value: self.clip_value,
        }
    }

    fn start(&self) -> Box<dyn Rule> {
        Box::new(*self)
    }

    fn limit(&mut self) -> Option<Limit<'_>> {
        Some((LimitKind::Other, "clip_value", &mut self.clip_value))
    }

    fn device_max_norm(&self) -> Option<f64> {
        Some(f64::INFINITY)
    }
}

impl Rule for Value {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        clamp(self.clip_value, given)
    }

    fn set_limit(&mut self, value: f64) {
        self.clip_value = value;
    }
}

/// Clamps gradients that were measured with this bound.
pub(super) fn clamp(clip_value: f64, given: &Given<'_>) -> Decision {
    let (total, zero_non_finite) = (given.measured.total, given.zero_non_finite);
    let is_clipped = total.num_clipped > 0;
    let edits = (is_clipped || zero_non_finite).then_some(Edits::All(Edit::Clamp {
        clip_value,
        clip_coef: 1.0,
        zero_non_finite,
    }));
    let clipped_norm = norm_of(total.clamped, given.measured.norm_type);
    Decision {
        was_clipped: is_clipped,
        num_clipped: total.num_clipped,
        ..Decision::new(edits, 1.0, clipped_norm)
    }
}
