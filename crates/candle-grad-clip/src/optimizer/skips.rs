//! Counts skipped steps in a row, with their warning and error.

use crate::clip::Clip;
use crate::error::{Error, Result};
use crate::skip_reason::SkipReason;

/// The number of steps skipped in a row, up to the latest.
#[derive(Debug, Default)]
pub(crate) struct Skips {
    pub(crate) in_a_row: u32,
}

/// A skipped step.
pub(super) struct Skip<'a> {
    pub(super) reason: SkipReason,
    pub(super) step: u64,
    /// The first Var at fault, if one is.
    pub(super) var: Option<String>,
    /// The number of non-finite elements.
    pub(super) non_finite: u64,
    pub(super) total_norm: f64,
    pub(super) loss: Option<f64>,
    pub(super) clip: &'a Clip,
}

impl Skips {
    pub(super) fn end(&mut self) {
        self.in_a_row = 0;
    }

    /// Counts a skipped step, and warns about it.
    ///
    /// # Errors
    /// The number exceeds `max_skips`.
    pub(super) fn count(&mut self, skip: Skip<'_>) -> Result<()> {
        self.in_a_row = self.in_a_row.saturating_add(1);
        let (skips, max_skips) = (self.in_a_row, skip.clip.max_skips);
        let Skip {
            reason,
            step,
            var,
            non_finite,
            total_norm,
            loss,
            clip,
        } = skip;
        if skips > max_skips {
            return Err(Error::TooManySkips {
                reason,
                skips,
                max_skips,
                var,
                total_norm,
                loss,
                clip: clip.to_string(),
            });
        }
        match reason {
            SkipReason::NonFinite => {
                let var = var.unwrap_or_default();
                tracing::warn!(
                    step,
                    var,
                    non_finite,
                    "step skipped: gradients are not finite"
                );
            }
            SkipReason::Overflow => {
                let var = var.unwrap_or_default();
                tracing::warn!(
                    step,
                    var,
                    "step skipped: a clipped gradient would not be finite"
                );
            }
            SkipReason::LargeNorm => {
                tracing::warn!(step, total_norm, "step skipped: the norm is too large");
            }
            SkipReason::LargeLoss => {
                let loss = loss.unwrap_or(f64::NAN);
                tracing::warn!(step, loss, "step skipped: the loss is too large");
            }
            SkipReason::Rule => {
                tracing::warn!(step, total_norm, "step skipped: by the ClipRule");
            }
        }
        Ok(())
    }
}
