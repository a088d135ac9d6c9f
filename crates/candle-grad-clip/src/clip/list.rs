//! Rules one after the other: each decides on what the ones before it leave, and all of it is one edit.
//!
//! The gradients are still read once. What a rule leaves is known from what was measured: one coefficient scales every norm,
//! one a Var that Var's, one a unit that unit's; and a clamp's result is measured beside its input.

use std::borrow::Cow;

use candle_grad_clip_kernels::{Edit, GradEdit, Stats};

use super::agc::scaled;
use super::{Action, Clip, Decision, Edits, Method, Observed, Rule, RuleState};
use crate::error::{Error, Result};
use crate::gradients::{GradStats, Measurements};

impl Clip {
    /// Several clips, one after the other: each sees the gradients as those before it leave them.
    ///
    /// [`Clip::norm_type`], [`Clip::non_finite`] and [`Clip::max_skips`] hold for the whole list: they may be set in any of
    /// the clips, or afterwards. A rule that skips a step ends the list. The report's norms are those before the first and after the
    /// last, its `clip_coef` the product of all. [`Clip::none`] is left out.
    ///
    /// What is measured stays one read of the gradients, so these are errors: a method that comes twice; [`Clip::value`]
    /// after a clip that scales, or together with [`Clip::agc`].
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let clip = Clip::all([Clip::value(3.5), Clip::norm(1.0)])?;
    /// assert_eq!(clip, "value:3.5+norm:1".parse()?);
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, clip)?;
    /// let report = opt.backward_step_report(&loss)?; // (3, 4), then (3, 3.5), then of norm 1
    /// assert_eq!((report.total_norm()?, report.num_clipped()?), (5.0, 1));
    /// assert!((report.clip_coef()? - 1.0 / 21.25f64.sqrt()).abs() < 1e-6);
    /// assert!((report.clipped_norm()? - 1.0).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidClip`] for those above, and for two different settings of what holds for the whole list.
    pub fn all(clips: impl IntoIterator<Item = Clip>) -> Result<Self> {
        let clips: Vec<Clip> = clips.into_iter().collect();
        let mut whole = Clip::none();
        let default = Clip::none();
        let mut differs = None;
        let mut merge = |name, is_same: bool| {
            if !is_same {
                differs = Some(name);
            }
        };
        // What is at its default gives way.
        for clip in &clips {
            if clip.norm_type != default.norm_type {
                let is_new = whole.norm_type == default.norm_type;
                merge("norm_type", is_new || whole.norm_type == clip.norm_type);
                whole.norm_type = clip.norm_type;
            }
            if clip.non_finite != default.non_finite {
                let is_new = whole.non_finite == default.non_finite;
                merge("non_finite", is_new || whole.non_finite == clip.non_finite);
                whole.non_finite = clip.non_finite;
            }
            if clip.max_skips != default.max_skips {
                let is_new = whole.max_skips == default.max_skips;
                merge("max_skips", is_new || whole.max_skips == clip.max_skips);
                whole.max_skips = clip.max_skips;
            }
        }
        let text: Vec<String> = clips.iter().map(ToString::to_string).collect();
        let text = text.join("+");
        if let Some(name) = differs {
            let reason = format!("{name} holds for the whole list, and is given twice");
            return Err(Error::InvalidClip { text, reason });
        }
        let rules = clips.into_iter().flat_map(|clip| clip.rules);
        let rules: Vec<Rule> = rules.filter(|rule| rule.method != Method::None).collect();
        if !rules.is_empty() {
            whole.rules = rules;
        }
        check(&whole)?;
        Ok(whole)
    }
}

/// Whether its rules can follow each other.
pub(super) fn check(clip: &Clip) -> Result<()> {
    match fault(&clip.rules) {
        Some(reason) => Err(Error::InvalidClip {
            text: clip.to_string(),
            reason,
        }),
        None => Ok(()),
    }
}

/// Why these rules can't follow each other.
fn fault(rules: &[Rule]) -> Option<String> {
    for (at, rule) in rules.iter().enumerate() {
        let (name, before) = (rule.method.name(), &rules[..at]);
        let same = |other: &Rule| {
            std::mem::discriminant(&other.method) == std::mem::discriminant(&rule.method)
        };
        if before.iter().any(same) {
            return Some(format!("`{name}` comes twice"));
        }
        let is_value = |rule: &Rule| matches!(rule.method, Method::Value { .. });
        if let Some(other) = before.iter().find(|other| is_value(rule) && other.scales()) {
            let other = other.method.name();
            return Some(format!(
                "`{name}` after `{other}` would need another read of the gradients: put `{name}` first"
            ));
        }
        if matches!(rule.method, Method::Agc(_)) && before.iter().any(is_value) {
            return Some(
                "the norms of `agc`'s units after `value` are not measured: take one of both"
                    .to_string(),
            );
        }
    }
    None
}

impl Rule {
    /// Whether it may multiply gradients.
    fn scales(&self) -> bool {
        match &self.method {
            Method::None | Method::Value { .. } => false,
            Method::Skip(rule) => rule.max_norm < f64::INFINITY,
            _ => true,
        }
    }
}

/// The decision of all rules.
pub(super) fn decide(
    rules: &[Rule],
    state: &RuleState,
    measured: &Measurements<'_>,
    zero_non_finite: bool,
) -> Decision {
    let mut now = Cow::Borrowed(measured);
    let mut whole: Option<Decision> = None;
    let mut observed = Vec::with_capacity(rules.len());
    for (at, rule) in rules.iter().enumerate() {
        // The first has set to 0 what is not finite.
        let mut next = rule.decide(state, &now, zero_non_finite && at == 0);
        if let Action::Refuse(_) = next.action {
            return next;
        }
        observed.push(std::mem::take(&mut next.observed));
        if at + 1 < rules.len()
            && let Action::Edit(edits) = &next.action
        {
            now = Cow::Owned(after(&now, edits));
        }
        whole = Some(match whole {
            None => next,
            Some(before) => then(before, next, measured.entries.len()),
        });
    }
    let whole = whole.unwrap_or_else(|| Decision::scale(measured, 1.0, zero_non_finite));
    Decision {
        observed: Observed::Each(observed),
        ..whole
    }
}

/// Both decisions as one.
fn then(first: Decision, second: Decision, vars: usize) -> Decision {
    let action = match (first.action, second.action) {
        (Action::Edit(first), Action::Edit(second)) => Action::Edit(first.then(second, vars)),
        (Action::Leave, action) | (action, _) => action,
    };
    let clip_coef = match &action {
        Action::Edit(edits) => edits.smallest_coef(),
        Action::Leave | Action::Refuse(_) => second.clip_coef,
    };
    Decision {
        action,
        clip_coef,
        clipped_norm: second.clipped_norm,
        was_clipped: first.was_clipped || second.was_clipped,
        num_clipped: first.num_clipped + second.num_clipped,
        groups: Vec::new(),
        observed: Observed::Nothing,
    }
}

/// What would be measured after these edits.
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

/// The stats of elements that are multiplied by a coefficient.
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
