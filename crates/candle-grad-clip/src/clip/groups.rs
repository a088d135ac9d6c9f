//! A limit for each param group, in addition to the global one: `min(clip_coef, max_norm / (group
//! norm + eps))`.
//!
//! Both norms are measured before clipping, so the order of the groups does not matter, and both
//! limits hold.

use std::sync::Arc;

use candle_grad_clip_kernels::{Edit, Stats};

use super::coef::{coef_to, smaller};
use super::decision::{Action, Decision, Given, GroupRecord};
use super::edits::Edits;
use super::per_var::{self, scaled_norm};
use crate::error::Result;
use crate::gradients::norm_of;
use crate::groups::{ParamGroup, ParamGroups};

/// The param groups of a wrapper's Vars.
#[derive(Debug, Clone, Default)]
pub(crate) struct Limits {
    groups: ParamGroups,
    /// The group of each Var, counted from 1; 0 for none.
    places: Arc<[usize]>,
    /// 1 for each Var of a `no_clip` group, 0 for others; empty if there is no such group.
    aside: Arc<[usize]>,
}

impl Limits {
    pub(crate) fn new(groups: ParamGroups, names: &[String]) -> Result<Self> {
        let places = groups.assign(names)?;
        let no_clip: Vec<bool> = groups.iter().map(ParamGroup::is_no_clip).collect();
        let is_aside = |place: &usize| usize::from(*place > 0 && no_clip[place - 1]);
        let aside = if no_clip.contains(&true) {
            places.iter().map(is_aside).collect()
        } else {
            Arc::default()
        };
        Ok(Self {
            groups,
            places,
            aside,
        })
    }

    pub(super) fn aside(&self) -> &Arc<[usize]> {
        &self.aside
    }

    pub(super) fn places(&self) -> &[usize] {
        &self.places
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.groups.iter().len() == 0
    }

    pub(crate) fn groups(&self) -> &ParamGroups {
        &self.groups
    }
}

/// Adds the groups' limits to the decision for all Vars.
pub(super) fn decide(given: &Given<'_>, common: Decision, limits: &Limits) -> Decision {
    let stats = stats_of_groups(given, limits);
    let own = own_coefs(given, limits, &stats);
    let has_limits = limits.groups.has_limits();
    let of_vars = match &common.action {
        Action::Edit(Edits::PerVar(edits)) if has_limits => Some(of_vars(edits, limits, &own)),
        _ => None,
    };
    let coefs: Vec<f64> = match &of_vars {
        None if !has_limits => smallest(&common, limits),
        None => own
            .iter()
            .map(|own| smaller(*own, common.clip_coef))
            .collect(),
        Some(of_vars) => {
            let mut smallest = own;
            for (coef, place) in of_vars.iter().zip(&*limits.places) {
                smallest[*place] = smaller(*coef, smallest[*place]);
            }
            smallest
        }
    };
    let groups = records(given, limits, &stats, &coefs);
    if let Some(of_vars) = of_vars {
        return Decision {
            groups,
            ..per_var::scale(given, of_vars)
        };
    }
    if !has_limits || coefs[1..].iter().all(|coef| *coef == common.clip_coef) {
        return Decision { groups, ..common };
    }
    let parts = stats.iter().map(|stats| stats.power);
    let scale = |&clip_coef| Edit::Scale {
        clip_coef,
        zero_non_finite: given.zero_non_finite,
    };
    Decision {
        clipped_norm: scaled_norm(given, parts.zip(coefs.iter().copied())),
        was_clipped: true,
        action: Action::Edit(Edits::Grouped {
            places: limits.places.clone(),
            edits: coefs.iter().map(scale).collect(),
        }),
        groups,
        ..common
    }
}

/// What each group measured; first the Vars of no group.
fn stats_of_groups(given: &Given<'_>, limits: &Limits) -> Vec<Stats> {
    let measured = given.measured;
    let mut stats = vec![Stats::ZERO; limits.groups.iter().len() + 1];
    for (entry, place) in measured.entries.iter().zip(&*limits.places) {
        if entry.grad.is_some() {
            stats[*place] = stats[*place].merge(entry.measured.stats, measured.norm_type);
        }
    }
    stats
}

/// The largest coefficient that each group's own limit allows; infinite for none, as for the Vars
/// of no group. A rule's coefficient may be above 1.
fn own_coefs(given: &Given<'_>, limits: &Limits, stats: &[Stats]) -> Vec<f64> {
    let coef = |(group, stats): (&ParamGroup, &Stats)| match group.max_norm {
        Some(max_norm) if max_norm < f64::INFINITY => {
            let norm_type = given.measured.norm_type;
            let zero_non_finite = given.zero_non_finite;
            coef_to(*stats, norm_type, max_norm, given.eps, zero_non_finite)
        }
        _ => f64::INFINITY,
    };
    let groups = limits.groups.iter().zip(&stats[1..]);
    std::iter::once(f64::INFINITY)
        .chain(groups.map(coef))
        .collect()
}

fn records(given: &Given<'_>, limits: &Limits, stats: &[Stats], coefs: &[f64]) -> Vec<GroupRecord> {
    let norm_type = given.measured.norm_type;
    let norm = |stats: Stats| {
        if given.zero_non_finite {
            stats.power.root(norm_type).value()
        } else {
            norm_of(stats, norm_type)
        }
    };
    let record = |((group, stats), coef): ((&ParamGroup, &Stats), &f64)| GroupRecord {
        name: group.name().to_string(),
        total_norm: norm(*stats),
        clip_coef: *coef,
    };
    let groups = limits.groups.iter().zip(&stats[1..]);
    groups.zip(&coefs[1..]).map(record).collect()
}

/// The smallest coefficient in each group.
fn smallest(common: &Decision, limits: &Limits) -> Vec<f64> {
    let groups = limits.groups.iter().len() + 1;
    let Action::Edit(edits) = &common.action else {
        return vec![1.0; groups];
    };
    let mut smallest = vec![f64::INFINITY; groups];
    for (index, place) in limits.places.iter().enumerate() {
        smallest[*place] = smaller(edits.smallest_coef_of(index), smallest[*place]);
    }
    smallest
}

/// The coefficient of each Var, if each has its own: the smaller of its own and its group's.
fn of_vars(edits: &[Edit], limits: &Limits, own: &[f64]) -> Vec<f64> {
    let coef = |edit: &Edit| match edit {
        Edit::Scale { clip_coef, .. } => *clip_coef,
        Edit::Clamp { .. } => 1.0,
    };
    let coefs = edits.iter().map(coef).zip(&*limits.places);
    coefs
        .map(|(coef, place)| smaller(own[*place], coef))
        .collect()
}
