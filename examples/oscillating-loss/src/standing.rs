//! How the arms stand: each over all its learning rates and seeds.

use crate::arm::Arm;
use crate::outcome::Outcome;
use crate::score::{decades, median, usable_range};

/// Which loss of a run counts; none for a run that diverged.
pub type Loss = fn(&Outcome) -> Option<f64>;

/// One arm over all learning rates.
#[derive(Debug)]
pub struct Standing<'a> {
    /// Which arm.
    pub arm: &'a Arm,
    /// Its runs, by learning rate.
    pub runs: Vec<&'a Outcome>,
    /// (learning rate, median of the loss over the seeds), rates ascending; infinite where most
    /// runs diverged.
    pub curve: Vec<(f64, f64)>,
    /// The lowest point of the curve, of the rates with the most seeds. Its rate is NaN if the arm
    /// diverged everywhere.
    pub best: (f64, f64),
    /// See [`usable_range`], against the best of all arms.
    pub usable: Option<(f64, f64)>,
}

impl<'a> Standing<'a> {
    /// Every arm of these runs, in the order of their first appearance.
    #[must_use]
    pub fn of_arms(outcomes: impl IntoIterator<Item = &'a Outcome>, loss: Loss) -> Vec<Self> {
        let mut arms: Vec<(&Arm, Vec<&Outcome>)> = Vec::new();
        for outcome in outcomes {
            let arm = &outcome.settings.arm;
            match arms.iter_mut().find(|(other, _)| *other == arm) {
                Some((_, runs)) => runs.push(outcome),
                None => arms.push((arm, vec![outcome])),
            }
        }
        let new = |(arm, runs)| Self::new(arm, runs, loss);
        let mut standings: Vec<Self> = arms.into_iter().map(new).collect();
        let losses = standings.iter().map(|standing| standing.best.1);
        let best = losses.fold(f64::INFINITY, f64::min);
        for standing in &mut standings {
            standing.usable = usable_range(&standing.curve, best).filter(|_| best.is_finite());
        }
        standings
    }

    fn new(arm: &'a Arm, mut runs: Vec<&'a Outcome>, loss: Loss) -> Self {
        runs.sort_by(|a, b| a.settings.lr.total_cmp(&b.settings.lr));
        let same_lr = |a: &&Outcome, b: &&Outcome| a.settings.lr.total_cmp(&b.settings.lr).is_eq();
        let most_seeds = runs.chunk_by(same_lr).map(<[_]>::len).max();
        let (mut curve, mut best) = (Vec::new(), (f64::NAN, f64::INFINITY));
        for runs in runs.chunk_by(same_lr) {
            let losses = runs.iter().map(|run| loss(run).unwrap_or(f64::INFINITY));
            let point = (runs[0].settings.lr, median(losses).unwrap_or(f64::INFINITY));
            curve.push(point);
            if point.1 < best.1 && Some(runs.len()) == most_seeds {
                best = point;
            }
        }
        Self {
            arm,
            runs,
            curve,
            best,
            usable: None,
        }
    }

    /// The runs at the arm's own best rate; none if the arm diverged everywhere.
    #[must_use]
    pub fn at_best(&self) -> Vec<&'a Outcome> {
        self.at(self.best.0)
    }

    /// The runs at a learning rate.
    #[must_use]
    pub fn at(&self, lr: f64) -> Vec<&'a Outcome> {
        let same_lr = |run: &&&Outcome| run.settings.lr.total_cmp(&lr).is_eq();
        self.runs.iter().filter(same_lr).copied().collect()
    }

    /// The runs that diverged.
    pub fn diverged(&self) -> impl Iterator<Item = &'a Outcome> {
        let runs = self.runs.iter().copied();
        runs.filter(|run| run.diverged.is_some())
    }

    /// Width of the usable range, 0 without one.
    #[must_use]
    pub fn usable_decades(&self) -> f64 {
        self.usable.map_or(0.0, decades)
    }
}
