//! What the run page needs of all steps, in bounded size but for 8 bytes a step.

use std::collections::{BTreeMap, VecDeque};

use candle_grad_clip::NormStatistics;

use crate::page::Curve;
use crate::param_norms::ParamNorms;
use crate::rows::{MetricsRow, ScalarRow};

/// The steps over which shares and means are taken.
pub(crate) const WINDOW: usize = 100;

/// The skipped steps that are kept with their numbers.
const MOST_SKIPS: usize = 20;

/// The steps of a run.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    pub(crate) steps: u64,
    pub(crate) last: Option<MetricsRow>,
    pub(crate) loss: LossHistory,
    pub(crate) total_norm: Curve,
    pub(crate) clipped_norm: Curve,
    pub(crate) limit: Curve,
    pub(crate) clip_coef: Curve,
    /// Of the last [`WINDOW`] steps.
    pub(crate) clipped_share: Curve,
    clipped_window: VecDeque<bool>,
    pub(crate) norms: NormStatistics,
    pub(crate) skips: Skips,
    pub(crate) missing: Missing,
    /// By name.
    pub(crate) scalars: BTreeMap<String, Curve>,
    pub(crate) param_norms: ParamNorms,
}

/// The losses of the steps.
#[derive(Debug, Clone, Default)]
pub(crate) struct LossHistory {
    pub(crate) curve: Curve,
    first: Vec<f64>,
    recent: VecDeque<f64>,
    /// Step and loss.
    pub(crate) lowest: Option<(u64, f64)>,
}

impl LossHistory {
    fn add(&mut self, step: u64, loss: f64) {
        self.curve.push(step as f64, loss);
        if self.first.len() < WINDOW {
            self.first.push(loss);
        }
        push_recent(&mut self.recent, loss, WINDOW);
        if self.lowest.is_none_or(|(_, lowest)| loss < lowest) && loss.is_finite() {
            self.lowest = Some((step, loss));
        }
    }

    /// The means of the first and of the last steps: at most [`WINDOW`] of each, and not more than
    /// half of all.
    pub(crate) fn first_and_last_mean(&self) -> Option<(f64, f64)> {
        let half = (self.curve.len() / 2).min(WINDOW as u64) as usize;
        let mean = |sum: f64| sum / half as f64;
        let last = self.recent.iter().rev().take(half).sum();
        (half > 0).then(|| (mean(self.first[..half].iter().sum()), mean(last)))
    }
}

/// The skipped steps.
#[derive(Debug, Clone, Default)]
pub(crate) struct Skips {
    /// The last ones, the oldest first.
    pub(crate) last: VecDeque<MetricsRow>,
    /// By reason.
    pub(crate) counts: BTreeMap<&'static str, u64>,
}

/// The Vars without a gradient, of the steps that this process has logged.
#[derive(Debug, Clone, Default)]
pub(crate) struct Missing {
    pub(crate) steps: u64,
    /// By name: in how many of them.
    pub(crate) counts: BTreeMap<String, u64>,
}

impl History {
    /// Adds a step, without the names that are missing.
    pub(crate) fn step(&mut self, row: MetricsRow) {
        let x = row.step as f64;
        self.steps += 1;
        if let Some(loss) = row.loss {
            self.loss.add(row.step, loss);
        }
        self.total_norm.push(x, row.total_norm);
        self.clip_coef.push(x, row.clip_coef);
        // A skipped step has no gradients afterwards; its 0 would hide the curve.
        if !row.skipped {
            self.clipped_norm.push(x, row.clipped_norm);
        }
        if let Some(limit) = row.limit {
            self.limit.push(x, limit);
        }
        push_recent(&mut self.clipped_window, row.was_clipped, WINDOW);
        self.clipped_share.push(x, self.recent_clipped_share());
        let norms = &mut self.norms;
        norms.add_numbers(row.total_norm, row.was_clipped, row.skipped);
        if row.skipped {
            *self.skips.counts.entry(reason(&row)).or_default() += 1;
            push_recent(&mut self.skips.last, row.clone(), MOST_SKIPS);
        }
        self.last = Some(row);
    }

    /// The share of the last steps that were clipped.
    pub(crate) fn recent_clipped_share(&self) -> f64 {
        let clipped = self.clipped_window.iter().filter(|clipped| **clipped);
        clipped.count() as f64 / self.clipped_window.len().max(1) as f64
    }

    pub(crate) fn missing(&mut self, names: &[String]) {
        self.missing.steps += 1;
        for name in names {
            match self.missing.counts.get_mut(name) {
                Some(count) => *count += 1,
                None => _ = self.missing.counts.insert(name.clone(), 1),
            }
        }
    }

    pub(crate) fn scalar(&mut self, row: ScalarRow) {
        let curve = self.scalars.entry(row.name).or_default();
        curve.push(row.step as f64, row.value);
    }
}

/// Why a step was skipped, for people.
pub(crate) fn reason(row: &MetricsRow) -> &'static str {
    use candle_grad_clip::SkipReason as R;
    match row.skip_reason {
        Some(R::NonFinite) => "gradients were NaN or infinite",
        Some(R::Overflow) => "scaling the gradients would have made one infinite",
        Some(R::LargeNorm) => "the norm was too large for the rule",
        Some(R::LargeLoss) => "the loss was too large for the rule",
        Some(R::Rule) => "a rule of your own decided so",
        _ => "unknown",
    }
}

fn push_recent<T>(recent: &mut VecDeque<T>, value: T, most: usize) {
    if recent.len() == most {
        recent.pop_front();
    }
    recent.push_back(value);
}
