//! The input and the result of a rule's decision.

use candle_grad_clip_kernels::{Edit, Stats};

use super::coef::clip_coef;
use super::edits::Edits;
use super::history;
use crate::gradients::Measurements;
use crate::skip_reason::SkipReason;

/// The input of a rule's decision.
#[derive(Debug, Clone, Copy)]
pub(super) struct Given<'a> {
    pub(super) measured: &'a Measurements<'a>,
    /// Added to norms before dividing by them.
    pub(super) eps: f64,
    /// Whether non-finite elements have to be set to 0.
    pub(super) zero_non_finite: bool,
}

impl Given<'_> {
    /// The global norm; only of the finite elements if the others become 0.
    pub(super) fn total_norm(&self) -> f64 {
        if self.zero_non_finite {
            self.measured.norm().value()
        } else {
            self.measured.total_norm()
        }
    }

    /// The global norm, if it may enter a history.
    pub(super) fn norm_that_counts(&self) -> Option<f64> {
        Some(self.total_norm()).filter(|norm| history::counts(*norm))
    }

    /// The clip coefficient for gradients with these statistics.
    pub(super) fn clip_coef(&self, stats: Stats, max_norm: f64) -> f64 {
        let norm_type = self.measured.norm_type;
        clip_coef(stats, norm_type, max_norm, self.eps, self.zero_non_finite)
    }
}

/// A rule's decision, and the statistics of the gradients after it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Decision {
    pub(crate) action: Action,
    pub(crate) clip_coef: f64,
    pub(crate) clipped_norm: f64,
    pub(crate) was_clipped: bool,
    pub(crate) num_clipped: u64,
    /// One for each param group.
    pub(crate) groups: Vec<GroupRecord>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// The gradients stay as they are, without a copy.
    Keep,
    Edit(Edits),
    /// The step is skipped.
    Skip(SkipReason),
}

/// The norm and the clip coefficient of one param group, from
/// [`StepRecord::groups`](crate::StepRecord::groups).
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct GroupRecord {
    /// The group's name.
    pub name: String,
    /// Norm of the group's gradients as one vector, before clipping.
    #[cfg_attr(feature = "serde", serde(with = "crate::serde_float"))]
    pub total_norm: f64,
    /// The clip coefficient; the smallest one if each Var has its own.
    #[cfg_attr(feature = "serde", serde(with = "crate::serde_float"))]
    pub clip_coef: f64,
}

impl Decision {
    /// `None` keeps the gradients.
    pub(super) fn new(edits: Option<Edits>, clip_coef: f64, clipped_norm: f64) -> Self {
        Self {
            was_clipped: clip_coef != 1.0,
            action: edits.map_or(Action::Keep, Action::Edit),
            clip_coef,
            clipped_norm,
            num_clipped: 0,
            groups: Vec::new(),
        }
    }

    pub(crate) fn skip(reason: SkipReason) -> Self {
        Self {
            action: Action::Skip(reason),
            was_clipped: false,
            ..Self::new(None, 0.0, 0.0)
        }
    }

    /// The equivalent decision for gradients that are still multiplied by the loss scale.
    pub(crate) fn unscaling(mut self, scale: f64) -> Self {
        if scale != 1.0 {
            self.action = match self.action {
                Action::Skip(reason) => Action::Skip(reason),
                Action::Keep => Action::Edit(Edits::All(Edit::NOTHING.unscaling(scale))),
                Action::Edit(edits) => Action::Edit(edits.unscaling(scale)),
            };
        }
        self
    }

    /// Multiplies all gradients by one coefficient. Changes nothing if it is exactly 1 and no
    /// non-finite elements have to become 0.
    pub(super) fn scale(given: &Given<'_>, clip_coef: f64) -> Self {
        let (measured, zero_non_finite) = (given.measured, given.zero_non_finite);
        let edits = (clip_coef != 1.0 || zero_non_finite).then_some(Edits::All(Edit::Scale {
            clip_coef,
            zero_non_finite,
        }));
        let clipped_norm = if zero_non_finite || measured.total.stats.non_finite() == 0 {
            measured.norm().scaled(clip_coef)
        } else {
            measured.total_norm() * clip_coef
        };
        Self::new(edits, clip_coef, clipped_norm)
    }
}
