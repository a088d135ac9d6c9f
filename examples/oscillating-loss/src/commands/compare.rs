//! Some arms, from the same initial weights and over the same batches.

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_grad_clip_log::{Progress, RunLog, compare_runs};

use crate::arm::Arm;
use crate::experiment::Experiment;
use crate::outcome::Outcome;
use crate::run::Run;
use crate::settings::Settings;
use crate::tables;

/// The runs of a comparison: one an arm.
#[must_use]
pub fn plan(experiment: &Experiment, arms: &[Arm], lr: f64) -> Vec<Settings> {
    arms.iter()
        .map(|arm| experiment.settings(arm, lr, experiment.base.seed))
        .collect()
}

/// Trains them side by side, each with a log in its own folder, and prints the curves.
///
/// # Errors
/// If a run fails or a folder can't be made.
pub fn run(experiment: &Experiment, plan: &[Settings]) -> Result<Vec<Run>> {
    let log = |settings: &Settings| log(experiment, settings).map(Some);
    let runs = experiment.train_all(plan, log)?;
    print(&runs);
    Ok(runs)
}

/// The folder of a run.
#[must_use]
pub fn folder(experiment: &Experiment, settings: &Settings) -> PathBuf {
    experiment.out.path().join(settings.arm.folder())
}

/// A new log in the folder of the run; an earlier log of ours is replaced.
///
/// # Errors
/// If it can't be made, or something else is in the way.
pub fn log(experiment: &Experiment, settings: &Settings) -> Result<RunLog> {
    let log = RunLog::overwrite(folder(experiment, settings))?;
    Ok(log.with_progress(Progress::Off))
}

/// Writes what is left of the runs: first numbers, then weights, then the page.
///
/// # Errors
/// If one can't be written; the others are written all the same.
pub fn write(experiment: &Experiment, runs: &[Run]) -> Result<()> {
    let numbers = experiment.write_results(runs);
    let weights = write_weights(experiment, runs);
    let page = compare_runs(experiment.out.path());
    numbers.and(weights).and(page.map_err(Into::into))
}

/// Writes the weights of each run into its folder.
///
/// # Errors
/// If one can't be written; the others are written all the same.
pub fn write_weights(experiment: &Experiment, runs: &[Run]) -> Result<()> {
    let write = |run: &Run| {
        let name = format!("{}/weights.safetensors", run.settings.arm.folder());
        let save = |path: &Path| Ok(run.weights.save(path)?);
        experiment.out.write(&name, save)
    };
    runs.iter().map(write).fold(Ok(()), Result::and)
}

/// Prints the curves.
pub fn print(runs: &[Run]) {
    let table = tables::curves(runs);
    println!("{}:\n{}", table.title, tables::text(&table));
    for run in runs.iter().map(Outcome::from) {
        let arm = &run.settings.arm;
        match &run.diverged {
            Some(why) => println!("{arm}: diverged at {why}; this arm stopped there."),
            None => println!(
                "{arm}: clipped {:.0} % of the steps, {:.1} ms a step.",
                100.0 * run.clipped_fraction,
                run.ms_per_step
            ),
        }
    }
}
