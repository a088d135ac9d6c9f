//! Groups with `no_clip`: the rules do not see their Vars, and no edit scales them.

use candle_grad_clip_kernels::{Edit, Stats};

use super::decision::{Action, Decision};
use super::edits::Edits;
use super::groups::Limits;
use super::non_finite::NonFinite;
use crate::gradients::{Entry, GradStats, Measurements, norm_of};

/// The measured statistics of the Vars in `no_clip` groups, by index.
pub(crate) struct SetAside(Vec<(usize, GradStats)>);

impl Limits {
    /// Removes the Vars of `no_clip` groups from `measured`, except for their counts of non-finite
    /// elements. Under `Propagate` these are removed too, as they would make the other Vars'
    /// coefficient NaN.
    pub(crate) fn set_aside(
        &self,
        measured: &mut Measurements<'_>,
        policy: NonFinite,
    ) -> Option<SetAside> {
        if self.aside().is_empty() {
            return None;
        }
        let mut aside = Vec::new();
        let mut total = GradStats::ZERO;
        for (index, entry) in measured.entries.iter_mut().enumerate() {
            if entry.grad.is_none() {
                continue;
            }
            if self.aside()[index] == 1 {
                aside.push((index, entry.measured));
                entry.measured = rest(entry, policy);
            }
            total = total.merge(entry.measured, measured.norm_type);
        }
        measured.total = total;
        Some(SetAside(aside))
    }

    /// Restores the statistics for the reports, and removes the Vars from the decided edits. Their
    /// division by the loss `scale` stays.
    pub(crate) fn put_back(
        &self,
        set_aside: Option<SetAside>,
        measured: &mut Measurements<'_>,
        decision: &mut Decision,
        scale: f64,
    ) {
        let Some(SetAside(vars)) = set_aside else {
            return;
        };
        let norm_type = measured.norm_type;
        let mut stats = vec![Stats::ZERO; self.groups().iter().len() + 1];
        for (index, of_var) in vars {
            measured.entries[index].measured = of_var;
            let sum = &mut stats[self.places()[index]];
            *sum = sum.merge(of_var.stats, norm_type);
        }
        let groups = self.groups().iter().zip(&stats[1..]);
        for ((group, stats), record) in groups.zip(&mut decision.groups) {
            if group.is_no_clip() {
                record.total_norm = norm_of(*stats, norm_type);
                record.clip_coef = 1.0;
            }
        }
        if let Action::Edit(edits) = &mut decision.action {
            let taken = std::mem::replace(edits, Edits::All(Edit::NOTHING));
            *edits = self.without_aside(taken, scale);
        }
    }

    /// The same edits, but these Vars keep only the zeroing of non-finite elements and the division
    /// by `scale`.
    fn without_aside(&self, edits: Edits, scale: f64) -> Edits {
        let leave = |zero_non_finite| {
            let edit = Edit::Scale {
                clip_coef: 1.0,
                zero_non_finite,
            };
            edit.unscaling(scale)
        };
        match edits {
            Edits::All(edit) => {
                let zeroes = Edits::All(edit).zeroes(0);
                Edits::Grouped {
                    places: self.aside().clone(),
                    edits: vec![edit, leave(zeroes)],
                }
            }
            edits => {
                let of = |(index, aside): (usize, &usize)| match aside {
                    1 => leave(edits.zeroes(index)),
                    _ => edits.of_whole(index),
                };
                Edits::PerVar(self.aside().iter().enumerate().map(of).collect())
            }
        }
    }
}

/// The part of such a Var's statistics that the rules still see.
fn rest(entry: &Entry<'_>, policy: NonFinite) -> GradStats {
    if policy == NonFinite::Propagate {
        return GradStats::ZERO;
    }
    let bad = |stats: Stats| Stats {
        nan: stats.nan,
        infinite: stats.infinite,
        ..Stats::ZERO
    };
    GradStats {
        stats: bad(entry.measured.stats),
        ..GradStats::ZERO
    }
}
