//! What a study says: a table for each optimizer and power, a row an arm.

use std::fmt::Write;

use anyhow::Result;

use crate::arm::Arm;
use crate::outcome::Outcome;
use crate::score::{decades, median, usable_range};
use crate::settings::OptimizerKind;
use crate::table::number;

/// One arm of one problem.
#[derive(Debug)]
struct Row<'a> {
    arm: &'a Arm,
    runs: Vec<&'a Outcome>,
    /// (rate, median of the test loss at the end), rates ascending; infinite where runs diverged.
    curve: Vec<(f64, f64)>,
    /// The rate with the lowest median, of those with the most seeds.
    best: f64,
}

impl<'a> Row<'a> {
    fn new(arm: &'a Arm, runs: Vec<&'a Outcome>) -> Self {
        let mut rates: Vec<f64> = runs.iter().map(|run| run.settings.lr).collect();
        rates.sort_by(f64::total_cmp);
        rates.dedup();
        let mut row = Self {
            arm,
            runs,
            curve: Vec::new(),
            best: f64::NAN,
        };
        let of_rate = |lr: &f64| {
            let losses = row.losses(*lr);
            let seeds = losses.len();
            (*lr, median(losses).unwrap_or(f64::INFINITY), seeds)
        };
        let points: Vec<_> = rates.iter().map(of_rate).collect();
        let most = points.iter().map(|(_, _, seeds)| *seeds).max();
        let candidates = points.iter().filter(|(_, _, seeds)| Some(*seeds) == most);
        let best = candidates.min_by(|a, b| a.1.total_cmp(&b.1));
        row.best = best.map_or(f64::NAN, |(lr, _, _)| *lr);
        row.curve = points.into_iter().map(|(lr, loss, _)| (lr, loss)).collect();
        row
    }

    fn at(&self, lr: f64) -> impl Iterator<Item = &Outcome> {
        let same = move |run: &&&Outcome| run.settings.lr.total_cmp(&lr).is_eq();
        self.runs.iter().filter(same).copied()
    }

    /// The test losses at the end, infinite for runs that diverged, the lowest first.
    fn losses(&self, lr: f64) -> Vec<f64> {
        let loss = |run: &Outcome| run.final_test_loss.unwrap_or(f64::INFINITY);
        let mut losses: Vec<f64> = self.at(lr).map(loss).collect();
        losses.sort_by(f64::total_cmp);
        losses
    }

    fn median_loss(&self) -> f64 {
        median(self.losses(self.best)).unwrap_or(f64::INFINITY)
    }

    fn median_of(&self, value: impl Fn(&Outcome) -> f64) -> f64 {
        median(self.at(self.best).map(value)).unwrap_or(f64::NAN)
    }

    fn line(&self, best_of_all: f64) -> String {
        let losses = self.losses(self.best);
        let (lowest, highest) = (losses.first(), losses.last());
        let range = [lowest, highest].map(|loss| number(loss.copied().unwrap_or(f64::NAN)));
        let usable = usable_range(&self.curve, best_of_all).map_or_else(String::new, |usable| {
            format!(
                "{:.1e} to {:.1e} ({:.1})",
                usable.0,
                usable.1,
                decades(usable)
            )
        });
        let diverged = self
            .runs
            .iter()
            .filter(|run| run.diverged.is_some())
            .count();
        let cells = [
            format!("`{}`", self.arm),
            format!("{:e}", self.best),
            number(self.median_loss()),
            format!("{} to {}", range[0], range[1]),
            losses.len().to_string(),
            number(self.median_of(|run| run.roughness.unwrap_or(f64::INFINITY))),
            format!(
                "{:.0} %",
                100.0 * self.median_of(|run| run.clipped_fraction)
            ),
            usable,
            format!("{diverged} of {}", self.runs.len()),
        ];
        format!("| {} |", cells.join(" | "))
    }
}

/// All tables, the best arm first in each.
///
/// # Errors
/// None: writing to a text doesn't fail.
pub fn markdown(outcomes: &[Outcome]) -> Result<String> {
    let mut text = String::new();
    let mut problems: Vec<(OptimizerKind, f64)> = Vec::new();
    for outcome in outcomes {
        let problem = (outcome.settings.optimizer, outcome.settings.power);
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }
    problems.sort_by(|a, b| {
        a.0.name()
            .cmp(b.0.name())
            .reverse()
            .then(b.1.total_cmp(&a.1))
    });
    for (optimizer, power) in problems {
        let of_problem = |outcome: &&Outcome| {
            let settings = &outcome.settings;
            settings.optimizer == optimizer && settings.power.total_cmp(&power).is_eq()
        };
        let mut rows = rows(outcomes.iter().filter(of_problem));
        rows.sort_by(|a, b| a.median_loss().total_cmp(&b.median_loss()));
        let best = rows.first().map_or(f64::INFINITY, Row::median_loss);
        writeln!(text, "## {}, power {power}\n", optimizer.name())?;
        writeln!(
            text,
            "| rule | best rate | test loss, median | lowest to highest | seeds | roughness | clipped | usable rates (decades) | diverged |\n\
             |---|---:|---:|---:|---:|---:|---:|---:|---:|"
        )?;
        for row in &rows {
            writeln!(text, "{}", row.line(best))?;
        }
        writeln!(text)?;
    }
    Ok(text)
}

fn rows<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Vec<Row<'a>> {
    let mut arms: Vec<(&Arm, Vec<&Outcome>)> = Vec::new();
    for outcome in outcomes {
        let arm = &outcome.settings.arm;
        match arms.iter_mut().find(|(other, _)| *other == arm) {
            Some((_, runs)) => runs.push(outcome),
            None => arms.push((arm, vec![outcome])),
        }
    }
    arms.into_iter()
        .map(|(arm, runs)| Row::new(arm, runs))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::settings::Settings;

    fn outcome(arm: &str, lr: f64, seed: u64, loss: Option<f64>) -> Outcome {
        Outcome {
            settings: Settings {
                arm: arm.parse().unwrap(),
                lr,
                seed,
                ..Settings::default()
            },
            diverged: loss.is_none().then(|| "step 3: the loss is NaN".into()),
            final_test_loss: loss,
            best_test_loss: loss,
            roughness: loss,
            max_total_norm: 1.0,
            clipped_fraction: 0.5,
            num_skipped: 0,
        }
    }

    #[test]
    fn the_best_rate_is_one_with_all_seeds_and_its_noise_is_shown() {
        let outcomes = [
            outcome("none", 1e-3, 0, Some(0.3)),
            outcome("none", 1e-2, 0, None),
            outcome("norm:1", 1e-3, 0, Some(0.2)),
            outcome("norm:1", 1e-3, 1, Some(0.22)),
            outcome("norm:1", 1e-3, 2, Some(0.27)),
            // Lower, but of one seed only.
            outcome("norm:1", 1e-2, 0, Some(0.1)),
            outcome("norm:1.0", 1e-1, 0, None),
        ];
        let text = markdown(&outcomes).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "## SGD, power 4");
        assert_eq!(
            lines[4],
            "| `norm:1` | 1e-3 | 0.2200 | 0.2000 to 0.2700 | 3 | 0.2200 | 50 % | 1.0e-3 to 1.0e-2 (1.0) | 1 of 5 |"
        );
        assert_eq!(
            lines[5],
            "| `none` | 1e-3 | 0.3000 | 0.3000 to 0.3000 | 1 | 0.3000 | 50 % |  | 1 of 2 |"
        );
        assert_eq!(lines.len(), 7);
    }

    #[test]
    fn problems_have_tables_of_their_own() {
        let mut adam = outcome("none", 1e-3, 0, Some(0.1));
        adam.settings.optimizer = OptimizerKind::AdamW;
        let mut cubic = outcome("none", 1e-3, 0, Some(0.1));
        cubic.settings.power = 3.0;
        let text = markdown(&[adam, cubic, outcome("none", 1e-3, 0, None)]).unwrap();
        let heads: Vec<&str> = text.lines().filter(|line| line.starts_with('#')).collect();
        assert_eq!(
            heads,
            ["## SGD, power 4", "## SGD, power 3", "## AdamW, power 4"]
        );
        assert!(
            text.contains("| `none` | 1e-3 | inf | inf to inf | 1 | inf |"),
            "{text}"
        );
    }
}
