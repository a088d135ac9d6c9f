//! Which `max_norm` to take: the norms that training has when nobody clips.

use std::fmt::Write;

use anyhow::{Context, Result};
use candle_grad_clip::{Clip, NormStatistics};

use crate::arm::{Arm, MAX_NORM};
use crate::experiment::Experiment;
use crate::run::Run;
use crate::settings::Settings;
use crate::tables::number;
use crate::train::{Extras, train};

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
    let run = train(
        settings,
        weather,
        interrupt,
        Extras::default(),
        |_, report| Ok(norms.add(report)?),
    )?;
    Ok((run, norms))
}

/// The distribution, in words.
///
/// # Errors
/// If not one norm was finite.
pub fn report((run, norms): &(Run, NormStatistics)) -> Result<String> {
    let percentile = |percentile| {
        let norm = norms.percentile_norm(percentile).map(number);
        norm.context("no finite norm: lower the learning rate")
    };
    let mut text = format!(
        "Norms of {} unclipped steps at a learning rate of {:e}: smallest {}, median {}, largest {}.",
        norms.steps(),
        run.settings.lr,
        percentile(0.0)?,
        percentile(50.0)?,
        percentile(100.0)?
    );
    for suggestion in norms.suggest_max_norm() {
        write!(text, "\n  {suggestion}")?;
    }
    if let Some(why) = &run.diverged {
        write!(
            text,
            "\n  (It diverged, so these norms mean little: {why}.)"
        )?;
    }
    Ok(text)
}

/// Where the limit of the story stands among the norms of the run.
#[must_use]
pub fn place_of_max_norm((run, _): &(Run, NormStatistics)) -> String {
    let is_above = |step: &&crate::run::Step| step.total_norm > MAX_NORM;
    let above = run.steps.iter().filter(is_above).count();
    format!("  (The runs below take {MAX_NORM:?}, which is below {above} of these norms.)")
}
