//! Which `max_norm` to take: the norms that training has when nobody clips.

use anyhow::{Result, anyhow};
use candle_grad_clip::{Clip, NormStatistics};

use crate::arm::Arm;
use crate::experiment::Experiment;
use crate::run::Run;
use crate::settings::Settings;
use crate::table::number;
use crate::train::train;

/// Steps that are looked at.
pub const STEPS: usize = 100;

/// A learning rate that is safe without clipping.
pub const SAFE_LR: f64 = 1e-4;

/// The run that this command does.
#[must_use]
pub fn plan(experiment: &Experiment, lr: f64, steps: usize) -> Settings {
    // The test loss is of no interest here: one evaluation, at the end.
    let settings = experiment.settings(&Arm::from(Clip::none()), lr, experiment.base.seed);
    Settings {
        steps,
        eval_every: steps,
        ..settings
    }
}

/// Trains without clipping; the run, and the distribution of its norms.
///
/// # Errors
/// If the device fails.
pub fn run(experiment: &Experiment, settings: &Settings) -> Result<(Run, NormStatistics)> {
    let mut norms = NormStatistics::default();
    let (weather, interrupt) = (&experiment.weather, experiment.interrupt);
    let run = train(settings, weather, interrupt, |_, report| {
        Ok(norms.add(report)?)
    })?;
    Ok((run, norms))
}

/// Prints the distribution.
///
/// # Errors
/// If not one norm was finite.
pub fn report(run: &Run, norms: &NormStatistics) -> Result<()> {
    let percentile = |percentile| {
        let norm = norms.percentile_norm(percentile);
        norm.map(number)
            .ok_or_else(|| anyhow!("no finite norm: lower the learning rate"))
    };
    println!(
        "Norms of {} unclipped steps at a learning rate of {:e}: smallest {}, median {}, largest {}.",
        norms.steps(),
        run.settings.lr,
        percentile(0.0)?,
        percentile(50.0)?,
        percentile(100.0)?
    );
    for suggestion in norms.suggest_max_norm() {
        println!("  {suggestion}");
    }
    if let Some(why) = &run.diverged {
        println!("  (It diverged, so these norms mean little: {why}.)");
    }
    Ok(())
}
