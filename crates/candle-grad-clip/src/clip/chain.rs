//! A chain of rules: each decides on the gradients after the rules before it. The result is one
//! edit.
//!
//! The gradients are still read once. The norms after a rule follow from the measured ones: a
//! coefficient scales all norms, or those of a Var or unit. The norm after a clamp is measured
//! together with the norm before it.

use std::borrow::Cow;

use candle_grad_clip_kernels::{Edit, GradEdit, Stats};

use super::coef::smaller;
use super::decision::{Action, Decision, Given};
use super::edits::Edits;
use super::per_var::scaled;
use super::rule::{Rule, Scope};
use crate::gradients::{GradStats, Measurements};

/// The reason why these methods cannot be chained, if there is one.
pub(super) fn fault(methods: &[(&str, Scope)]) -> Option<String> {
    for (at, (name, scope)) in methods.iter().enumerate() {
        let before = &methods[..at];
        if before.iter().any(|(other, _)| other == name) {
            return Some(format!("`{name}` comes twice"));
        }
        for (other, before) in before {
            match (before, scope) {
                (Scope::Vars | Scope::Units { .. }, Scope::Elements { .. }) => {
                    return Some(format!(
                        "`{name}` after `{other}` would need another read of the gradients: put `{name}` first"
                    ));
                }
                (Scope::Elements { .. }, Scope::Units { .. }) => {
                    return Some(format!(
                        "the norms of `{name}`'s units after `{other}` are not measured: take one of both"
                    ));
                }
                _ => {}
            }
        }
    }
    None
}

/// The combined decision of all rules, each with its eps.
pub(super) fn decide<'r>(
    rules: impl ExactSizeIterator<Item = (&'r mut Box<dyn Rule>, f64)>,
    measured: &Measurements<'_>,
    zero_non_finite: bool,
) -> Decision {
    let last = rules.len().saturating_sub(1);
    let mut now = Cow::Borrowed(measured);
    let mut whole: Option<Decision> = None;
    for (at, (rule, eps)) in rules.enumerate() {
        let next = rule.decide(&Given {
            measured: &now,
            eps,
            // The first rule has already zeroed the non-finite elements.
            zero_non_finite: zero_non_finite && at == 0,
        });
        if let Action::Skip(_) = next.action {
            return next;
        }
        if at < last
            && let Action::Edit(edits) = &next.action
        {
            now = Cow::Owned(after(&now, edits));
        }
        whole = Some(match whole {
            None => next,
            Some(before) => then(before, next, measured),
        });
    }
    let given = Given {
        measured,
        eps: 0.0,
        zero_non_finite,
    };
    whole.unwrap_or_else(|| Decision::scale(&given, 1.0))
}

/// Combines two decisions.
fn then(first: Decision, second: Decision, measured: &Measurements<'_>) -> Decision {
    let entries = &measured.entries;
    let action = match (first.action, second.action) {
        (Action::Edit(first), Action::Edit(second)) => {
            Action::Edit(first.then(second, entries.len()))
        }
        (Action::Keep, action) | (action, _) => action,
    };
    let clip_coef = match &action {
        Action::Edit(edits) => {
            let with_grad = (0..entries.len()).filter(|index| entries[*index].grad.is_some());
            let coefs = with_grad.map(|index| edits.smallest_coef_of(index));
            coefs.reduce(smaller).unwrap_or(1.0)
        }
        Action::Keep | Action::Skip(_) => second.clip_coef,
    };
    Decision {
        action,
        clip_coef,
        clipped_norm: second.clipped_norm,
        was_clipped: first.was_clipped || second.was_clipped,
        num_clipped: first.num_clipped + second.num_clipped,
        groups: Vec::new(),
    }
}

/// The measurements after these edits.
fn after<'g>(measured: &Measurements<'g>, edits: &Edits) -> Measurements<'g> {
    let mut after = measured.clone();
    let norm_type = measured.norm_type;
    for (index, entry) in after.entries.iter_mut().enumerate() {
        let edit = edits.of(index);
        if let Some(units) = &mut after.units {
            for (at, unit) in units.plan.range(index).enumerate() {
                let coef = match edit {
                    GradEdit::Units(edit) => edit.coefs[at],
                    GradEdit::All(edit) => coef_of(edit),
                };
                units.grads[unit] = of_stats(units.grads[unit], coef, edits.zeroes(index));
            }
        }
        let stats = &mut entry.measured.stats;
        *stats = match (edit, &after.units) {
            (GradEdit::Units(_), Some(units)) => {
                let units = units.grads[units.plan.range(index)].iter();
                units.fold(Stats::ZERO, |sum, unit| sum.merge(*unit, norm_type))
            }
            (GradEdit::All(edit @ Edit::Clamp { .. }), _) => {
                of_stats(entry.measured.clamped, coef_of(edit), edits.zeroes(index))
            }
            (GradEdit::All(edit), _) => of_stats(*stats, coef_of(edit), edits.zeroes(index)),
            (GradEdit::Units(_), None) => *stats,
        };
    }
    let with_grad = after.entries.iter().filter(|entry| entry.grad.is_some());
    let stats = with_grad.fold(Stats::ZERO, |sum, entry| {
        sum.merge(entry.measured.stats, norm_type)
    });
    after.total = GradStats {
        stats,
        ..after.total
    };
    after
}

fn coef_of(edit: Edit) -> f64 {
    match edit {
        Edit::Scale { clip_coef, .. } | Edit::Clamp { clip_coef, .. } => clip_coef,
    }
}

/// The statistics of elements after scaling by a coefficient.
fn of_stats(stats: Stats, coef: f64, zero_non_finite: bool) -> Stats {
    let power = scaled(stats.power, coef);
    if zero_non_finite {
        return Stats {
            power,
            ..Stats::ZERO
        };
    }
    Stats { power, ..stats }
}
