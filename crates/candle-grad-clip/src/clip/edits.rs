//! The edits of the Vars' gradients.

use std::sync::Arc;

use candle_grad_clip_kernels::{Edit, GradEdit, UnitEdit};

use super::coef::smaller;
use crate::gradients::UnitPlan;

/// One edit for all Vars, or one per group, per Var or per unit.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Edits {
    All(Edit),
    Grouped {
        /// For each Var, the index of its edit in `edits`.
        places: Arc<[usize]>,
        edits: Vec<Edit>,
    },
    PerVar(Vec<Edit>),
    PerUnit(UnitEdits),
}

/// A coefficient for each unit of each Var.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UnitEdits {
    pub(super) plan: Arc<UnitPlan>,
    /// One for each unit.
    pub(super) coefs: Vec<f64>,
    pub(super) zero_non_finite: bool,
}

impl UnitEdits {
    /// The coefficients of a Var's units.
    fn of_var(&self, index: usize) -> &[f64] {
        &self.coefs[self.plan.range(index)]
    }

    /// Multiplies the coefficients of each Var by that of another edit.
    fn times(mut self, edit: impl Fn(usize) -> Edit) -> Self {
        for index in 0..self.plan.len() {
            let (coef, zero_non_finite) = coef_of(edit(index));
            self.zero_non_finite |= zero_non_finite;
            for own in &mut self.coefs[self.plan.range(index)] {
                *own *= coef;
            }
        }
        self
    }
}

fn coef_of(edit: Edit) -> (f64, bool) {
    match edit {
        Edit::Scale {
            clip_coef,
            zero_non_finite,
        }
        | Edit::Clamp {
            clip_coef,
            zero_non_finite,
            ..
        } => (clip_coef, zero_non_finite),
    }
}

impl Edits {
    pub(crate) fn of(&self, index: usize) -> GradEdit<'_> {
        let Self::PerUnit(units) = self else {
            return self.of_whole(index).into();
        };
        let coefs = units.of_var(index);
        let first = coefs.first().copied().unwrap_or(1.0);
        if coefs.iter().all(|coef| *coef == first) {
            return self.of_whole(index).into();
        }
        let edit = UnitEdit {
            units: units.plan.units(index),
            coefs,
            zero_non_finite: units.zero_non_finite,
        };
        edit.into()
    }

    /// The edit of a Var; for units, the edit of its first unit.
    pub(super) fn of_whole(&self, index: usize) -> Edit {
        match self {
            Self::All(edit) => *edit,
            Self::Grouped { places, edits } => edits[places[index]],
            Self::PerVar(edits) => edits[index],
            Self::PerUnit(units) => Edit::Scale {
                clip_coef: units.of_var(index).first().copied().unwrap_or(1.0),
                zero_non_finite: units.zero_non_finite,
            },
        }
    }

    /// The equivalent edits for gradients that are still multiplied by the loss scale.
    pub(crate) fn unscaling(self, scale: f64) -> Self {
        let each = |edits: Vec<Edit>| edits.into_iter().map(|e| e.unscaling(scale)).collect();
        match self {
            Self::All(edit) => Self::All(edit.unscaling(scale)),
            Self::Grouped { places, edits } => Self::Grouped {
                places,
                edits: each(edits),
            },
            Self::PerVar(edits) => Self::PerVar(each(edits)),
            Self::PerUnit(units) => Self::PerUnit(UnitEdits {
                coefs: units.coefs.into_iter().map(|coef| coef / scale).collect(),
                ..units
            }),
        }
    }

    /// Whether non-finite elements become 0.
    pub(super) fn zeroes(&self, index: usize) -> bool {
        coef_of(self.of_whole(index)).1
    }

    /// Whether each unit has its own coefficient.
    pub(crate) fn are_of_units(&self) -> bool {
        matches!(self, Self::PerUnit(_))
    }

    /// Whether no gradient is changed.
    pub(crate) fn is_nothing(&self) -> bool {
        match self {
            Self::All(edit) => *edit == Edit::NOTHING,
            Self::Grouped { edits, .. } | Self::PerVar(edits) => {
                edits.iter().all(|edit| *edit == Edit::NOTHING)
            }
            Self::PerUnit(units) => {
                !units.zero_non_finite && units.coefs.iter().all(|coef| *coef == 1.0)
            }
        }
    }

    /// These edits followed by `next`, for `vars` Vars.
    pub(super) fn then(self, next: Self, vars: usize) -> Self {
        match (self, next) {
            (Self::All(first), Self::All(second)) => Self::All(both(first, second)),
            (Self::PerUnit(units), other) | (other, Self::PerUnit(units)) => {
                Self::PerUnit(units.times(|index| other.of_whole(index)))
            }
            (first, second) => {
                let of = |index| both(first.of_whole(index), second.of_whole(index));
                Self::PerVar((0..vars).map(of).collect())
            }
        }
    }

    /// The smallest coefficient of a Var.
    pub(super) fn smallest_coef_of(&self, index: usize) -> f64 {
        match self {
            Self::PerUnit(units) => smallest(units.of_var(index)),
            _ => smallest(&[coef_of(self.of_whole(index)).0]),
        }
    }
}

/// The smallest coefficient, or NaN if one is NaN; 1 if there is none.
fn smallest(coefs: &[f64]) -> f64 {
    coefs.iter().copied().reduce(smaller).unwrap_or(1.0)
}

/// `first` followed by `second`, as one edit.
fn both(first: Edit, second: Edit) -> Edit {
    let ((a, zero_first), (b, zero_second)) = (coef_of(first), coef_of(second));
    let zero_non_finite = zero_first || zero_second;
    let clip_coef = a * b;
    match (first, second) {
        (Edit::Clamp { clip_value, .. }, _) => Edit::Clamp {
            clip_value,
            clip_coef,
            zero_non_finite,
        },
        (Edit::Scale { .. }, Edit::Clamp { clip_value, .. }) => Edit::Clamp {
            clip_value: clip_value / a, // `a` is 1: a value clip comes before clips that scale
            clip_coef,
            zero_non_finite,
        },
        (Edit::Scale { .. }, Edit::Scale { .. }) => Edit::Scale {
            clip_coef,
            zero_non_finite,
        },
    }
}
