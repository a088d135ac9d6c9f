//! The bare command: my weighted power loss oscillates; does clipping help, how, and with which
//! limit?

use anyhow::Result;
use candle_grad_clip_log::page::{Mark, Section};
use candle_grad_clip_log::runs_sections;

use super::{compare, find_max_norm, sweep};
use crate::arms::Arms;
use crate::experiment::Experiment;
use crate::pages;
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
    experiment.write_config("story", &plan)?;

    let optimizer = experiment.base.optimizer_name();
    println!(
        "The loss: mean(w |e|^{power}), w = 1 + {alpha} |y|, {steps} steps a run, {optimizer}."
    );
    println!("\n1. Which limit?");
    let unclipped = find_max_norm::run(experiment, &limit)?;
    let limits = find_max_norm::report(&unclipped)?;
    println!("{limits}\n{}", find_max_norm::place_of_max_norm(&unclipped));

    let mut runs = Vec::new();
    if !experiment.interrupted() {
        println!(
            "\n2. One setting, learning rate {SHOWN_LR:e}: same initial weights, same batches."
        );
        runs = compare::run(experiment, &shown)?;
    }
    // Again at the end, with the others: those take minutes in which much can happen.
    let mut written = experiment.write_results(&runs);
    written = written.and(compare::write_weights(experiment, &runs));
    if !experiment.interrupted() {
        let (seeds, count) = (sweep::SEEDS, rest.len());
        println!("\n3. Other learning rates, {seeds} seeds each: {count} more runs.");
        runs.extend(experiment.train_all(&rest, |_| Ok(None))?);
    }
    println!("\n4. How the arms stand.");
    let mut more = runs_sections(experiment.out.path()).unwrap_or_default();
    let text = format!("Learning rate {SHOWN_LR:e}: same initial weights, same batches.");
    let mark = Mark::None;
    more.insert(more.len().min(1), Section::Text { text, mark }); // below the first heading
    more.push(pages::heading("Which limit?"));
    let text = limits;
    more.push(Section::Text { text, mark });
    written.and(sweep::report(experiment, &runs, more))?;
    Ok(runs)
}
