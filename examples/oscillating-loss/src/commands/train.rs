//! One run, which may leave checkpoints, or go on from one.

use anyhow::Result;

use crate::checkpoint::Checkpoints;
use crate::commands::compare;
use crate::experiment::Experiment;
use crate::late::Late;
use crate::parallel::Watch;
use crate::run::Run;
use crate::settings::Settings;
use crate::train::{Extras, GradientWatch, train_with};

/// Trains and writes all files, with histograms of the gradients in the event file every so many
/// steps; what earlier parts of a resumed run did is in them as well.
///
/// # Errors
/// If the run fails or a file can't be written.
pub fn run(
    experiment: &Experiment,
    settings: &Settings,
    checkpoints: Option<&Checkpoints>,
    histograms: Option<usize>,
) -> Result<Vec<Run>> {
    let plan = std::slice::from_ref(settings);
    compare::folders(experiment, plan)?;
    experiment.write_config("train", plan)?;
    let bars = compare::bars(experiment, plan)?;
    if let Some(checkpoint) = checkpoints.and_then(|these| these.resumed.as_ref()) {
        announce(checkpoint.step(), settings.steps);
        for step in checkpoint.steps(settings) {
            bars.step(0, &step)?;
        }
    }
    let mut runs = Vec::new();
    if !experiment.interrupted() {
        let (weather, interrupt) = (&experiment.weather, experiment.interrupt);
        let look = |step, vars: &_, grads: &_| bars.events(0).gradients(step, vars, grads);
        let gradients = histograms.map(|every| GradientWatch { every, look: &look });
        let extras = Extras {
            checkpoints,
            gradients,
        };
        let run = train_with(settings, weather, interrupt, extras, |step, _| {
            bars.step(0, step)
        })?;
        bars.end(0, &run)?;
        runs.push(run);
    }
    bars.flush();
    compare::print(&runs);
    let mut late = Late::default();
    late.keep(experiment.write_results(&runs));
    for run in &mut runs {
        late.keep(run.unsaved.take().map_or(Ok(()), Err));
    }
    compare::write(experiment, &runs, &mut late);
    late.end()?;
    Ok(runs)
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
