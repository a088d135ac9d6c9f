//! The bare command: my weighted power loss oscillates; does clipping help, how, and with which
//! limit?

use anyhow::Result;

use super::{compare, find_max_norm, sweep};
use crate::arm::MAX_NORM;
use crate::arms::Arms;
use crate::experiment::Experiment;
use crate::late::Late;
use crate::run::Run;
use crate::settings::Settings;

/// The learning rate of the one setting that is shown in full.
pub const SHOWN_LR: f64 = 3e-3;

/// All four parts.
///
/// # Errors
/// If a run fails or a file can't be written.
pub fn run(experiment: &Experiment) -> Result<Vec<Run>> {
    let Settings {
        power,
        alpha,
        steps,
        seed,
        ..
    } = experiment.base;
    let Arms(arms) = Arms::STORY.parse()?;
    let limit = find_max_norm::plan(experiment, find_max_norm::SAFE_LR, find_max_norm::STEPS);
    let shown = compare::plan(experiment, &arms, SHOWN_LR);
    // The sweep has the runs that are shown among its own: they are not done twice.
    let mut rest = sweep::plan(experiment, &arms, &sweep::RATES, sweep::SEEDS);
    rest.retain(|run| run.lr.total_cmp(&SHOWN_LR).is_ne() || run.seed != seed);
    let plan: Vec<Settings> = shown.iter().chain(&rest).cloned().collect();
    compare::folders(experiment, &shown)?;
    experiment.write_config("story", &plan)?;

    println!(
        "The loss: mean(w |e|^{power}), w = 1 + {alpha} |y|, {} steps a run, {}.",
        steps,
        experiment.base.optimizer_name()
    );
    println!("\n1. Which limit?");
    let (unclipped, norms) = find_max_norm::run(experiment, &limit)?;
    find_max_norm::report(&unclipped, &norms)?;
    let above = unclipped
        .steps
        .iter()
        .filter(|step| step.total_norm > MAX_NORM)
        .count();
    println!("  (The runs below take {MAX_NORM:?}, which is below {above} of these norms.)");

    let (mut runs, mut late) = (Vec::new(), Late::default());
    if !experiment.interrupted() {
        println!(
            "\n2. One setting, learning rate {SHOWN_LR:e}: same initial weights, same batches."
        );
        runs = compare::run(experiment, &shown)?;
        // Again at the end, with the others: those take minutes in which much can happen.
        late.keep(experiment.write_results(&runs));
        compare::write(experiment, &runs, &mut late);
    }
    if !experiment.interrupted() {
        println!(
            "\n3. Other learning rates, {} seeds each: {} more runs.",
            sweep::SEEDS,
            rest.len()
        );
        runs.extend(sweep::run(experiment, &rest)?);
    }
    println!("\n4. How the arms stand.");
    sweep::report(experiment, &runs);
    late.keep(experiment.write_results(&runs));
    late.keep(sweep::draw(experiment, &runs));
    late.end()?;
    Ok(runs)
}
