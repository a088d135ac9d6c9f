//! Each arm at each learning rate, with more than one seed.

use anyhow::Result;

use crate::arm::Arm;
use crate::experiment::Experiment;
use crate::progress::Total;
use crate::run::Run;
use crate::settings::Settings;
use crate::summary::Standing;
use crate::{conclusion, figures, table};

/// The learning rates of the story, three decades.
pub const RATES: [f64; 6] = [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1];

/// Seeds for each arm and rate.
pub const SEEDS: u64 = 2;

/// The runs of a sweep.
#[must_use]
pub fn plan(experiment: &Experiment, arms: &[Arm], rates: &[f64], seeds: u64) -> Vec<Settings> {
    let first = experiment.base.seed;
    let mut plan = Vec::new();
    for arm in arms {
        for lr in rates {
            let runs = first..first.saturating_add(seeds);
            plan.extend(runs.map(|seed| experiment.settings(arm, *lr, seed)));
        }
    }
    plan
}

/// Trains with all of the settings.
///
/// # Errors
/// If a run fails.
pub fn run(experiment: &Experiment, settings: &[Settings]) -> Result<Vec<Run>> {
    let total = Total::new(settings.len(), experiment.base.steps)?;
    experiment.train_all(settings, &total)
}

/// Writes the picture of all runs.
///
/// # Errors
/// If it can't be written.
pub fn draw(experiment: &Experiment, runs: &[Run]) -> Result<()> {
    let chart = figures::sweep(&Standing::of_arms(runs), &experiment.baselines);
    plot::line_chart(&chart, &experiment.out.path().join("sweep"))
}

/// Prints how the arms stand.
pub fn report(experiment: &Experiment, runs: &[Run]) {
    let standings = Standing::of_arms(runs);
    println!(
        "Best test loss by learning rate (median over the seeds; NaN: half of them or more diverged):"
    );
    println!("{}", table::grid(&standings));
    println!();
    println!(
        "Each arm at its own best learning rate (means over the seeds, best loss the median):"
    );
    println!("{}", table::standings(&standings, &experiment.baselines));
    println!();
    if experiment.interrupted() {
        println!("Interrupted: no conclusion from a part of the runs.");
    } else {
        for sentence in conclusion::sentences(&standings, &experiment.baselines) {
            println!("{sentence}");
        }
    }
}
