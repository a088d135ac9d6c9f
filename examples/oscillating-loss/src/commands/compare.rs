//! Some arms, from the same initial weights and over the same batches.

use anyhow::Result;

use crate::arm::Arm;
use crate::events::Events;
use crate::experiment::Experiment;
use crate::late::Late;
use crate::out_dir::OutDir;
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

/// Trains them side by side, with live bars and `TensorBoard` events; then prints the curves.
///
/// # Errors
/// If a run fails or an event file can't be made.
pub fn run(experiment: &Experiment, settings: &[Settings]) -> Result<Vec<Run>> {
    let bars = bars(experiment, settings)?;
    let runs = experiment.train_all(settings, &bars)?;
    bars.flush();
    print(&runs);
    Ok(runs)
}

/// The folder of each run.
///
/// # Errors
/// If one can't be made, or has something of this program's names in it that the program has not
/// written.
pub fn folders(experiment: &Experiment, settings: &[Settings]) -> Result<Vec<OutDir>> {
    settings
        .iter()
        .map(|settings| experiment.out.folder(&settings.arm.folder()))
        .collect()
}

/// Bars for these runs, and an event file in each one's folder.
///
/// # Errors
/// If a folder or a file can't be made.
pub fn bars(experiment: &Experiment, settings: &[Settings]) -> Result<Bars> {
    let events = folders(experiment, settings)?
        .iter()
        .map(|folder| Events::create(folder.path()))
        .collect::<Result<Vec<_>>>()?;
    Bars::new(settings, events)
}

/// Writes numbers and weights, and then the pictures. What can't be written costs nothing else.
pub fn write(experiment: &Experiment, runs: &[Run], late: &mut Late) {
    let out = &experiment.out;
    let in_folder = |run: &Run, write: &dyn Fn(&OutDir) -> Result<()>| {
        write(&out.folder(&run.settings.arm.folder())?)
    };
    for run in runs {
        late.keep(in_folder(run, &|folder| {
            folder.write("param_norms.csv", |path| run.param_norms.write_csv(path))
        }));
    }
    for run in runs {
        late.keep(in_folder(run, &|folder| {
            folder.write("weights.safetensors", |path| {
                Ok(run.weights.0.save(path)?)
            })
        }));
    }
    for run in runs {
        late.keep(in_folder(run, &|folder| {
            let map = run.param_norms.heat_map(figures::title(run));
            plot::heat_map(&map, &folder.path().join("param_norms"))
        }));
    }
    let (loss, norm) = (figures::loss(runs), figures::grad_norm(runs));
    late.keep(plot::line_chart(&loss, &out.path().join("loss")));
    late.keep(plot::line_chart(&norm, &out.path().join("grad_norm")));
}

/// Prints the curves.
pub fn print(runs: &[Run]) {
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
