//! Warns when the coefficient is almost 0 for several steps in a row, under any rule: the model
//! does not train then.

use crate::clip::TINY_COEF;

/// The warning comes at this many such steps in a row.
const TOLD_AT: u64 = 10;

/// Counts the steps in a row with a tiny coefficient.
#[derive(Debug, Default)]
pub(crate) struct TinyCoefs {
    in_a_row: u64,
}

impl TinyCoefs {
    /// Counts a step that was taken, and warns once per row of tiny coefficients. A step with norm
    /// 0 neither counts nor ends the row.
    pub(crate) fn count(&mut self, step: u64, total_norm: f64, clip_coef: f64) -> u64 {
        let before = self.in_a_row;
        self.in_a_row = after(before, total_norm, clip_coef);
        if self.in_a_row == TOLD_AT && before < TOLD_AT {
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

    /// The number as of the last step that was taken.
    pub(crate) fn in_a_row(&self) -> u64 {
        self.in_a_row
    }
}

/// The number after a step that was taken, from the number before it.
pub(super) fn after(in_a_row: u64, total_norm: f64, clip_coef: f64) -> u64 {
    if total_norm == 0.0 {
        in_a_row
    } else if clip_coef < TINY_COEF {
        in_a_row.saturating_add(1)
    } else {
        0
    }
}
