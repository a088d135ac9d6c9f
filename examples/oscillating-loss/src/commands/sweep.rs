//! Each arm at each learning rate, with more than one seed.

use anyhow::{Context, Result};
use candle_grad_clip_log::page::Section;

use crate::arm::Arm;
use crate::experiment::Experiment;
use crate::outcome::Outcome;
use crate::run::Run;
use crate::settings::Settings;
use crate::standing::Standing;
use crate::{conclusion, pages, tables};

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

/// Prints how the arms stand, then writes the numbers and the page; `more` comes at its end.
///
/// # Errors
/// If a file can't be written; the others are written all the same.
pub fn report(experiment: &Experiment, runs: &[Run], more: Vec<Section>) -> Result<()> {
    let outcomes = Outcome::of_finished(runs);
    let standings = Standing::of_arms(&outcomes, |run| run.best_test_loss);
    for table in [
        tables::grid(&standings),
        tables::standings(&standings, &experiment.baselines),
    ] {
        println!("{}:\n{}\n", table.title, tables::text(&table));
    }
    for sentence in conclusion::sentences(&standings, experiment) {
        println!("{sentence}");
    }
    let numbers = experiment.write_results(runs);
    let page = pages::sweep(experiment, &standings, more);
    let path = experiment.out.path().join("index.html");
    let page = page.write(&path);
    numbers.and(page.with_context(|| format!("can't write `{}`", path.display())))
}
