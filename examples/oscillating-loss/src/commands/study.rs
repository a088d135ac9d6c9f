//! Every way of clipping, on both optimizers and two powers of the loss, with more seeds: which to
//! take?
//!
//! A run that is done is a line of `runs.jsonl`, and is not done again: the study goes on where it
//! was stopped.

use std::fs;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use crate::arm::Arm;
use crate::data::Weather;
use crate::experiment::runs_bar;
use crate::out_dir::OutDir;
use crate::outcome::{self, Outcome, Writer};
use crate::parallel::for_each;
use crate::settings::{OptimizerKind, Settings};
use crate::standing::Standing;
use crate::tables;
use crate::train::{Extras, train};

/// The rules of the library with the defaults of their papers or, where these have none, limits
/// that suit the example.
pub const ARMS: &str = "none,norm:1,value:0.1,param-norm:1,block-rms:0.1,auto,quantile,zclip,zclip:max_norm=inf,adagc,agc,skip";

/// The powers of the loss.
pub const POWERS: [f64; 2] = [4.0, 3.0];

/// Seeds for each arm, rate, optimizer and power.
pub const SEEDS: u64 = 5;

/// Learning rates, half decades around the best ones of this optimizer.
#[must_use]
pub fn rates(optimizer: OptimizerKind) -> [f64; 5] {
    match optimizer {
        OptimizerKind::Sgd => [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        OptimizerKind::AdamW => [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    }
}

/// What a study tries.
#[derive(Debug, Clone)]
pub struct Study {
    /// What is done to the gradients.
    pub arms: Vec<Arm>,
    /// Which optimizers.
    pub optimizers: Vec<OptimizerKind>,
    /// Exponents of the loss.
    pub powers: Vec<f64>,
    /// Learning rates; [`rates`] if there are none here.
    pub rates: Vec<f64>,
    /// Seeds from 0 upwards.
    pub seeds: u64,
    /// Steps of a run.
    pub steps: usize,
}

impl Study {
    /// The runs. Seeds change last: a study that is stopped has whole smaller ones in it.
    #[must_use]
    pub fn plan(&self) -> Vec<Settings> {
        let of = |settings: &Settings| match &*self.rates {
            [] => rates(settings.optimizer).to_vec(),
            rates => rates.to_vec(),
        };
        self.plan_with(of)
    }

    /// Only the `count` rates of each arm, optimizer and power that have the lowest test loss at
    /// the end with the first seed, of all that are `done`.
    #[must_use]
    pub fn plan_best(&self, done: &[Outcome], count: usize) -> Vec<Settings> {
        self.plan_with(|settings| {
            let same_but_lr = |outcome: &&Outcome| {
                let first = Settings {
                    seed: 0,
                    lr: outcome.settings.lr,
                    ..settings.clone()
                };
                outcome.settings == first
            };
            let mut rates: Vec<(f64, f64)> = done
                .iter()
                .filter(same_but_lr)
                .filter_map(|outcome| Some((outcome.final_test_loss?, outcome.settings.lr)))
                .collect();
            rates.sort_by(|a, b| a.0.total_cmp(&b.0));
            rates.truncate(count);
            rates.into_iter().map(|(_, lr)| lr).collect()
        })
    }

    fn plan_with(&self, rates: impl Fn(&Settings) -> Vec<f64>) -> Vec<Settings> {
        let mut plan = Vec::new();
        for seed in 0..self.seeds {
            for power in &self.powers {
                for optimizer in &self.optimizers {
                    for arm in &self.arms {
                        let settings = Settings {
                            arm: arm.clone(),
                            optimizer: *optimizer,
                            power: *power,
                            steps: self.steps,
                            seed,
                            ..Settings::default()
                        };
                        let with_rate = |lr| Settings {
                            lr,
                            ..settings.clone()
                        };
                        plan.extend(rates(&settings).into_iter().map(with_rate));
                    }
                }
            }
        }
        plan
    }
}

/// Does what `runs.jsonl` lacks of the study (`best`: see [`Study::plan_best`]), and writes
/// `tables.md` from all that is in it.
///
/// # Errors
/// If a run fails, or a file can't be read or written.
pub fn run(
    study: &Study,
    best: Option<usize>,
    weather: &Weather,
    out: &OutDir,
    interrupt: &AtomicBool,
) -> Result<()> {
    let file = out.path().join("runs.jsonl");
    let mut all = outcome::read(&file)?;
    let mut left = match best {
        None => study.plan(),
        Some(count) => study.plan_best(&all, count),
    };
    let planned = left.len();
    left.retain(|settings| all.iter().all(|outcome| outcome.settings != *settings));
    println!(
        "{} of {planned} runs are done already.",
        planned - left.len()
    );
    let bar = runs_bar(left.len(), study.steps);
    let file = Mutex::new(Writer::new(&file));
    let device = weather.train.x.device();
    let new = for_each(left.len(), device, interrupt, |at| {
        let extras = Extras::default();
        let run = train(&left[at], weather, interrupt, extras, |_, _| {
            bar.inc(1);
            Ok(())
        })?;
        let outcome = (!run.interrupted).then(|| Outcome::from(&run));
        if let Some(outcome) = &outcome {
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = file.add(outcome) {
                eprintln!("warning: {error:#}; the study goes on, and tries again later");
            }
        }
        Ok(outcome)
    })?;
    bar.finish_and_clear();
    all.extend(new.into_iter().flatten());
    let mut file = file.into_inner().unwrap_or_else(PoisonError::into_inner);
    let written = file.write();
    let text = markdown(&all);
    println!("{text}");
    written.and(out.write("tables.md", |path| Ok(fs::write(path, text)?)))
}

/// A table for each optimizer and power, as Markdown.
#[must_use]
pub fn markdown(outcomes: &[Outcome]) -> String {
    let mut problems: Vec<(OptimizerKind, f64)> = Vec::new();
    for outcome in outcomes {
        let problem = (outcome.settings.optimizer, outcome.settings.power);
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }
    // SGD before AdamW, high powers first.
    problems.sort_by(|a, b| {
        let names = b.0.name().cmp(a.0.name());
        names.then(b.1.total_cmp(&a.1))
    });
    let mut text = String::new();
    for problem in problems {
        let is_of =
            |outcome: &&Outcome| (outcome.settings.optimizer, outcome.settings.power) == problem;
        let outcomes = outcomes.iter().filter(is_of);
        let standings = Standing::of_arms(outcomes, |run| run.final_test_loss);
        let title = format!("{}, power {}", problem.0.name(), problem.1);
        let table = tables::study(&title, &standings);
        text.extend(["## ", &title, "\n\n", &tables::text(&table), "\n\n"]);
    }
    text
}
