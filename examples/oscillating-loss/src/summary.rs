//! `summary.json`, and how the arms stand after a sweep.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::arm::Arm;
use crate::baseline::Baselines;
use crate::run::Run;
use crate::score::{decades, median, usable_range};
use crate::settings::OptimizerKind;

/// The contents of `summary.json`. Numbers that are not finite are `null` there.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// One entry a run.
    pub arms: Vec<RunSummary>,
    /// By arm: width of the usable range, 0 if it is a single rate or none; see
    /// [`usable_range`].
    pub usable_lr_decades: BTreeMap<String, f64>,
    /// By arm: the lowest median test loss, at the arm's own best rate.
    pub best_test_loss: BTreeMap<String, f64>,
    /// What costs no training.
    pub baselines: Baselines,
}

/// One run in `summary.json`.
#[derive(Debug, Serialize)]
#[expect(
    missing_docs,
    reason = "the names are the documented ones of `Run` and `Settings`"
)]
pub struct RunSummary {
    pub arm: Arm,
    pub optimizer: OptimizerKind,
    pub momentum: f64,
    pub power: f64,
    pub lr: f64,
    pub seed: u64,
    pub final_test_loss: f64,
    pub best_test_loss: f64,
    pub roughness: Option<f64>,
    pub max_total_norm: f64,
    pub clipped_fraction: f64,
    pub diverged: bool,
    pub ms_per_step: f64,
}

impl From<&Run> for RunSummary {
    fn from(run: &Run) -> Self {
        Self {
            arm: run.settings.arm.clone(),
            optimizer: run.settings.optimizer,
            momentum: run.settings.momentum,
            power: run.settings.power,
            lr: run.settings.lr,
            seed: run.settings.seed,
            final_test_loss: run.final_test_loss(),
            best_test_loss: run.best_test_loss(),
            roughness: run.roughness(),
            max_total_norm: run.max_total_norm(),
            clipped_fraction: run.clipped_fraction(),
            diverged: run.diverged.is_some(),
            ms_per_step: run.ms_per_step(),
        }
    }
}

impl Summary {
    /// Sums up all runs.
    #[must_use]
    pub fn new(runs: &[Run], baselines: Baselines) -> Self {
        let standings = Standing::of_arms(runs);
        Self {
            arms: runs.iter().map(RunSummary::from).collect(),
            usable_lr_decades: by_arm(&standings, Standing::usable_decades),
            best_test_loss: by_arm(&standings, |standing| standing.best.1),
            baselines,
        }
    }
}

fn by_arm<'a>(
    standings: &[Standing<'a>],
    value: impl Fn(&Standing<'a>) -> f64,
) -> BTreeMap<String, f64> {
    standings
        .iter()
        .map(|standing| (standing.arm.to_string(), value(standing)))
        .collect()
}

/// One arm over all learning rates.
#[derive(Debug)]
pub struct Standing<'a> {
    /// Which arm.
    pub arm: Arm,
    /// Its runs that were not interrupted, by learning rate, then seed.
    pub runs: Vec<&'a Run>,
    /// (learning rate, median over the seeds of the best test loss), rates ascending; infinite
    /// where a run diverged and the median says so.
    pub curve: Vec<(f64, f64)>,
    /// The lowest point of the curve.
    pub best: (f64, f64),
    /// See [`usable_range`], against the best of all arms.
    pub usable: Option<(f64, f64)>,
}

impl<'a> Standing<'a> {
    /// Every arm of these runs, in the order of their first appearance.
    #[must_use]
    pub fn of_arms(runs: &'a [Run]) -> Vec<Self> {
        let mut standings: Vec<Self> = Vec::new();
        for run in runs.iter().filter(|run| !run.interrupted) {
            let arm = &run.settings.arm;
            match standings.iter_mut().find(|standing| standing.arm == *arm) {
                Some(standing) => standing.runs.push(run),
                None => standings.push(Self::empty(arm.clone(), run)),
            }
        }
        for standing in &mut standings {
            standing.draw_curve();
        }
        let best = standings
            .iter()
            .map(|standing| standing.best.1)
            .fold(f64::INFINITY, f64::min);
        for standing in &mut standings {
            standing.usable = usable_range(&standing.curve, best).filter(|_| best.is_finite());
        }
        standings
    }

    fn empty(arm: Arm, run: &'a Run) -> Self {
        let best = (f64::NAN, f64::INFINITY);
        Self {
            arm,
            runs: vec![run],
            curve: Vec::new(),
            best,
            usable: None,
        }
    }

    fn draw_curve(&mut self) {
        self.runs
            .sort_by(|a, b| a.settings.lr.total_cmp(&b.settings.lr));
        let same_lr = |a: &&Run, b: &&Run| a.settings.lr.total_cmp(&b.settings.lr).is_eq();
        for runs in self.runs.chunk_by(same_lr) {
            let losses = runs.iter().map(|run| run.best_test_loss());
            let point = (runs[0].settings.lr, median(losses).unwrap_or(f64::INFINITY));
            self.curve.push(point);
            if point.1 < self.best.1 {
                self.best = point;
            }
        }
    }

    /// The runs at the arm's own best rate; none if the arm diverged everywhere.
    #[must_use]
    pub fn at_best(&self) -> Vec<&'a Run> {
        self.at(self.best.0)
    }

    /// The runs at a learning rate.
    #[must_use]
    pub fn at(&self, lr: f64) -> Vec<&'a Run> {
        self.runs
            .iter()
            .filter(|run| run.settings.lr.total_cmp(&lr).is_eq())
            .copied()
            .collect()
    }

    /// How many of the runs diverged.
    #[must_use]
    pub fn num_diverged(&self) -> usize {
        self.runs
            .iter()
            .filter(|run| run.diverged.is_some())
            .count()
    }

    /// Width of the usable range, 0 without one.
    #[must_use]
    pub fn usable_decades(&self) -> f64 {
        self.usable.map_or(0.0, decades)
    }
}
