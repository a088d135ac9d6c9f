//! Some arms, from the same initial weights and over the same batches.

use anyhow::Result;

use crate::arm::Arm;
use crate::events::Events;
use crate::experiment::Experiment;
use crate::progress::Bars;
use crate::run::Run;
use crate::settings::Settings;
use crate::{figures, table};

/// The runs of a comparison: one an arm.
#[must_use]
pub fn plan(experiment: &Experiment, arms: &[Arm], lr: f64) -> Vec<Settings> {
    arms.iter()
        .map(|arm| experiment.settings(arm, lr, experiment.base.seed))
        .collect()
}

/// Trains them side by side, with live bars and `TensorBoard` events; then writes pictures and weights
/// and prints the curves.
///
/// # Errors
/// If a run fails or a file can't be written.
pub fn run(experiment: &Experiment, settings: &[Settings]) -> Result<Vec<Run>> {
    let bars = bars(experiment, settings)?;
    let runs = experiment.train_all(settings, &bars)?;
    bars.flush()?;
    show(experiment, &runs)?;
    Ok(runs)
}

/// Bars for these runs, and an event file in each one's folder.
///
/// # Errors
/// If a folder or a file can't be made.
pub fn bars(experiment: &Experiment, settings: &[Settings]) -> Result<Bars> {
    let events = settings
        .iter()
        .map(|settings| Events::create(experiment.out.folder(&settings.arm.folder())?.path()))
        .collect::<Result<Vec<_>>>()?;
    Bars::new(settings, events)
}

/// Writes pictures and weights, and prints the curves.
///
/// # Errors
/// If a file can't be written.
pub fn show(experiment: &Experiment, runs: &[Run]) -> Result<()> {
    let out = &experiment.out;
    for run in runs {
        let folder = out.folder(&run.settings.arm.folder())?;
        folder.write("weights.safetensors", |path| {
            Ok(run.weights.0.save(path)?)
        })?;
        folder.write("param_norms.csv", |path| run.param_norms.write_csv(path))?;
        let map = run.param_norms.heat_map(figures::title(run));
        plot::heat_map(&map, &folder.path().join("param_norms"))?;
    }
    plot::line_chart(&figures::loss(runs), &out.path().join("loss"))?;
    plot::line_chart(&figures::grad_norm(runs), &out.path().join("grad_norm"))?;
    print(runs);
    Ok(())
}

fn print(runs: &[Run]) {
    println!("Test loss by step:");
    println!("{}", table::curves(runs));
    for run in runs {
        let arm = &run.settings.arm;
        match &run.diverged {
            Some(why) => println!("{arm}: diverged at {why}; this arm stopped there."),
            None => println!(
                "{arm}: clipped {:.0} % of the steps, {:.1} ms a step.",
                100.0 * run.clipped_fraction(),
                run.ms_per_step()
            ),
        }
    }
}
