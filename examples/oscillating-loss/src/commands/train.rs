//! One run, which may leave checkpoints, or resume from one.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use candle_grad_clip_log::{MetricsRow, Progress, RunLog, read_metrics, read_scalars};

use crate::commands::compare;
use crate::experiment::Experiment;
use crate::run::{Run, Step};
use crate::saves::Saves;
use crate::settings::Settings;
use crate::train::{Extras, train};

/// Trains and writes all files, with histograms of the gradients in the event file every so many
/// steps; what earlier parts of a resumed run did is in them as well.
///
/// # Errors
/// If the run fails or a file can't be written.
pub fn run(
    experiment: &Experiment,
    settings: &Settings,
    saves: Option<&Saves>,
    histograms: Option<usize>,
) -> Result<()> {
    experiment.write_config("train", std::slice::from_ref(settings))?;
    let (log, before) = match saves.and_then(Saves::resumed) {
        None => (compare::log(experiment, settings)?, Vec::new()),
        Some(step) => {
            announce(step, settings.steps);
            let folder = compare::folder(experiment, settings);
            let log = RunLog::resume(&folder, step as u64)?;
            (log, steps_of(&folder, settings)?)
        }
    };
    let mut runs: Vec<Run> = Vec::new();
    if !experiment.interrupted() {
        let extras = Extras {
            log: Some(log.with_progress(Progress::Auto)),
            histograms,
            saves,
            before,
        };
        let (weather, interrupt) = (&experiment.weather, experiment.interrupt);
        let run = train(settings, weather, interrupt, extras, |_, _| Ok(()))?;
        runs.push(run);
    }
    compare::print(&runs);
    let written = compare::write(experiment, &runs);
    let saved = runs.pop().and_then(|run| run.unsaved).map_or(Ok(()), Err);
    written.and(saved)
}

/// The steps that a log has, as part of a run with these settings: where it is longer than it was
/// to be, the evaluation at the former end goes.
fn steps_of(folder: &Path, settings: &Settings) -> Result<Vec<Step>> {
    let scalars = folder.join("scalars.csv");
    // There is none before the first evaluation.
    let scalars = if scalars.exists() {
        read_scalars(scalars)?
    } else {
        Vec::new()
    };
    let losses = scalars.iter().filter(|row| row.name == "loss/test");
    let losses: BTreeMap<u64, f64> = losses.map(|row| (row.step, row.value)).collect();
    let step = |row: MetricsRow| Step {
        step: row.step as usize,
        train_loss: row.loss.unwrap_or(f64::NAN),
        test_loss: Some(&row.step)
            .filter(|step| settings.evaluates(**step as usize))
            .and_then(|step| losses.get(step).copied()),
        total_norm: row.total_norm,
        clipped_norm: row.clipped_norm,
        clip_coef: row.clip_coef,
        was_clipped: row.was_clipped,
        skipped: row.skipped,
    };
    let rows = read_metrics(folder.join("metrics.csv"))?;
    Ok(rows.into_iter().map(step).collect())
}

fn announce(step: usize, steps: usize) {
    if step == steps {
        println!(
            "This run is finished: all {steps} steps are done. Its files are written again; a larger \
             --steps goes on.\n"
        );
    } else {
        println!("Going on from step {step} of {steps}.\n");
    }
}
