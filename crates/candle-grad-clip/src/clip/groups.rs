//! A limit for each group of Vars, beside the one for all: `min(clip_coef, max_norm / (group norm + eps))`.
//!
//! Both norms are those before clipping, so the order of the groups does not matter, and both limits hold.

use std::sync::Arc;

use candle_grad_clip_kernels::{Edit, PartialPower, Stats};

use super::{Action, Decision, Edits, clip_coef};
use crate::Result;
use crate::measure::{Measurements, norm_of};
use crate::optim::ParamGroups;

/// What one group of Vars measured, and what its gradients were multiplied by: of
/// [`StepReport::groups`](crate::StepReport::groups).
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct GroupRecord {
    /// The group's name.
    pub name: String,
    /// Norm of the group's gradients as one vector before clipping.
    #[cfg_attr(feature = "serde", serde(with = "crate::serde_float"))]
    pub total_norm: f64,
    /// What they were multiplied by.
    #[cfg_attr(feature = "serde", serde(with = "crate::serde_float"))]
    pub clip_coef: f64,
}

/// The groups of a wrapper's Vars.
#[derive(Debug, Clone, Default)]
pub(crate) struct Limits {
    groups: ParamGroups,
    /// The place of each Var's group, counted from 1; 0 for none.
    places: Arc<[usize]>,
}

impl Limits {
    pub(crate) fn new(groups: ParamGroups, names: &[String]) -> Result<Self> {
        let places = groups.assign(names)?;
        Ok(Self { groups, places })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.groups.iter().len() == 0
    }

    pub(crate) fn groups(&self) -> &ParamGroups {
        &self.groups
    }
}

/// What was decided for all, with the groups' own limits.
pub(super) fn decide(
    measured: &Measurements<'_>,
    common: Decision,
    limits: &Limits,
    eps: f64,
    zero_non_finite: bool,
) -> Decision {
    let norm_type = measured.norm_type;
    let mut stats = vec![Stats::ZERO; limits.groups.iter().len() + 1];
    for (entry, place) in measured.entries.iter().zip(&*limits.places) {
        if entry.grad.is_some() {
            stats[*place] = stats[*place].merge(entry.measured.stats, norm_type);
        }
    }
    let mut coefs = vec![common.clip_coef];
    for (group, stats) in limits.groups.iter().zip(&stats[1..]) {
        let max_norm = group.limit().unwrap_or(f64::INFINITY);
        let coef = clip_coef(*stats, norm_type, max_norm, eps, zero_non_finite);
        // NaN, where there is one.
        coefs.push(if coef < common.clip_coef || coef.is_nan() {
            coef
        } else {
            common.clip_coef
        });
    }
    let norm = |stats: Stats| {
        if zero_non_finite {
            stats.power.root(norm_type).value()
        } else {
            norm_of(stats, norm_type)
        }
    };
    let record =
        |((group, stats), coef): ((&crate::optim::ParamGroup, &Stats), &f64)| GroupRecord {
            name: group.name().to_string(),
            total_norm: norm(*stats),
            clip_coef: *coef,
        };
    let groups = limits
        .groups
        .iter()
        .zip(&stats[1..])
        .zip(&coefs[1..])
        .map(record)
        .collect();
    if coefs[1..].iter().all(|coef| *coef == common.clip_coef) {
        return Decision { groups, ..common };
    }
    Decision {
        clipped_norm: clipped_norm(measured, &stats, &coefs, zero_non_finite),
        was_clipped: true,
        action: Action::Edit(Edits::Grouped {
            places: limits.places.clone(),
            edits: coefs
                .iter()
                .map(|&clip_coef| Edit::Scale {
                    clip_coef,
                    zero_non_finite,
                })
                .collect(),
        }),
        groups,
        ..common
    }
}

/// The norm of all groups, each scaled by its own coefficient.
fn clipped_norm(
    measured: &Measurements<'_>,
    stats: &[Stats],
    coefs: &[f64],
    zero_non_finite: bool,
) -> f64 {
    if measured.total.stats.non_finite() > 0 && !zero_non_finite {
        return f64::NAN;
    }
    let mut all = PartialPower::ZERO;
    for (stats, coef) in stats.iter().zip(coefs) {
        if *coef > 0.0 {
            let scaled = PartialPower {
                scale: stats.power.scale * coef,
                sum: stats.power.sum,
            };
            all = all.merge(scaled, measured.norm_type);
        }
    }
    all.root(measured.norm_type).value()
}
