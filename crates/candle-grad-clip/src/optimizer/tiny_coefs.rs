//! Steps in a row whose coefficient is next to 0, whatever the rule: a model that stands still is
//! told.

use crate::clip::TINY_COEF;

/// How many such steps in a row are told.
const TOLD_AT: u64 = 10;

/// The latest of them, in a row.
#[derive(Debug, Default)]
pub(crate) struct TinyCoefs {
    in_a_row: u64,
}

impl TinyCoefs {
    /// Counts a step that was taken, and warns once of a row. A step of norm 0, in which nothing
    /// was clipped, neither counts nor ends it.
    pub(crate) fn count(&mut self, step: u64, total_norm: f64, clip_coef: f64) -> u64 {
        if total_norm == 0.0 {
            return self.in_a_row;
        }
        self.in_a_row = if clip_coef < TINY_COEF {
            self.in_a_row.saturating_add(1)
        } else {
            0
        };
        if self.in_a_row == TOLD_AT {
            tracing::warn!(
                step,
                total_norm,
                clip_coef,
                steps = TOLD_AT,
                "clipping leaves next to nothing of the gradients (of some, where each Var or unit has its own coefficient): is \
                 the limit meant to be so far below the norms?"
            );
        }
        self.in_a_row
    }

    /// Of the latest step that was taken.
    pub(crate) fn in_a_row(&self) -> u64 {
        self.in_a_row
    }
}
