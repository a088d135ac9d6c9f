//! Every way of clipping, on both optimizers and two powers of the loss, with more seeds: which to
//! take?
//!
//! A run that is done is a line of `runs.jsonl`, and is not done again: the study goes on where it
//! was stopped.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;

use anyhow::Result;

use crate::arm::Arm;
use crate::late::Late;
use crate::out_dir::OutDir;
use crate::outcome::{self, Outcome};
use crate::parallel::{Watch, train_all};
use crate::progress::Total;
use crate::run::{Run, Step};
use crate::settings::{OptimizerKind, Settings};
use crate::source::Source;
use crate::study_table;

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
    source: &Source,
    out: &OutDir,
    interrupt: &AtomicBool,
) -> Result<()> {
    let file = out.path().join("runs.jsonl");
    let done = outcome::read(&file)?;
    let mut left = match best {
        None => study.plan(),
        Some(count) => study.plan_best(&done, count),
    };
    let planned = left.len();
    left.retain(|settings| done.iter().all(|outcome| outcome.settings != *settings));
    println!(
        "{} of {planned} runs are done already.",
        planned - left.len()
    );
    let mut late = Late::default();
    let mut unwritten = Vec::new();
    if let Some(steps) = left.first().map(|settings| settings.steps) {
        let log = Log {
            total: Total::new(left.len(), steps)?,
            file: &file,
            unwritten: Mutex::default(),
        };
        train_all(&left, &source.open()?, interrupt, &log)?;
        let mut last = log
            .unwritten
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        late.keep(write_down(&file, &mut last));
        unwritten = last;
    }
    let mut all = outcome::read(&file)?;
    all.extend(unwritten);
    let text = study_table::markdown(&all)?;
    println!("{text}");
    late.keep(out.write("tables.md", |path| Ok(fs::write(path, text)?)));
    late.end()
}

/// Adds the outcomes to the file; those that can't be written stay in the list.
fn write_down(file: &Path, outcomes: &mut Vec<Outcome>) -> Result<()> {
    while let Some(first) = outcomes.first() {
        outcome::append(file, first)?;
        outcomes.remove(0);
    }
    Ok(())
}

/// Writes each run down as it ends. Where the disk is full, it is tried again at the end of the
/// next.
struct Log<'a> {
    total: Total,
    file: &'a Path,
    unwritten: Mutex<Vec<Outcome>>,
}

impl Watch for Log<'_> {
    fn step(&self, at: usize, step: &Step) -> Result<()> {
        self.total.step(at, step)
    }

    fn end(&self, at: usize, run: &Run) -> Result<()> {
        if !run.interrupted {
            let mut unwritten = self
                .unwritten
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let is_first = unwritten.is_empty();
            unwritten.push(Outcome::from(run));
            let written = write_down(self.file, &mut unwritten);
            if let (true, Err(error)) = (is_first, written) {
                eprintln!("warning: {error:#}; the study goes on, and tries again later");
            }
        }
        self.total.end(at, run)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn study() -> Study {
        Study {
            arms: vec!["none".parse().unwrap(), "auto".parse().unwrap()],
            optimizers: vec![OptimizerKind::Sgd],
            powers: vec![4.0],
            rates: vec![1e-3, 1e-2, 1e-1],
            seeds: 2,
            steps: 500,
        }
    }

    #[test]
    fn a_plan_has_everything_once_and_whole_studies_first() {
        let plan = study().plan();
        assert_eq!(plan.len(), 12);
        assert!(plan[..6].iter().all(|settings| settings.seed == 0));
        for (at, settings) in plan.iter().enumerate() {
            assert!(!plan[..at].contains(settings));
        }
        let by_default = Study {
            rates: Vec::new(),
            optimizers: vec![OptimizerKind::Sgd, OptimizerKind::AdamW],
            ..study()
        };
        assert_eq!(by_default.plan().len(), 40);
    }

    #[test]
    fn what_cannot_be_written_down_is_written_later() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("runs.jsonl");
        let outcome = |settings: Settings| Outcome {
            settings,
            diverged: None,
            final_test_loss: Some(1.0),
            best_test_loss: None,
            roughness: None,
            max_total_norm: 1.0,
            clipped_fraction: 0.0,
            num_skipped: 0,
        };
        let all: Vec<Outcome> = study().plan().into_iter().map(outcome).collect();
        let mut waiting = all[..2].to_vec();
        fs::create_dir(&file).unwrap();
        write_down(&file, &mut waiting).unwrap_err();
        assert_eq!(waiting, all[..2]);
        fs::remove_dir(&file).unwrap();
        waiting.push(all[2].clone());
        write_down(&file, &mut waiting).unwrap();
        assert!(waiting.is_empty());
        assert_eq!(outcome::read(&file).unwrap(), all[..3]);
    }

    #[test]
    fn the_best_rates_are_those_of_the_first_seed() {
        let done = |settings: &Settings| {
            let loss = match (settings.arm.is_none(), settings.lr) {
                (true, lr) if lr > 5e-2 => None, // diverged
                (true, lr) => Some(lr),
                (false, lr) => Some(1.0 - lr - 0.9 * settings.seed as f64),
            };
            Outcome {
                settings: settings.clone(),
                diverged: None,
                final_test_loss: loss,
                best_test_loss: loss,
                roughness: None,
                max_total_norm: 1.0,
                clipped_fraction: 0.0,
                num_skipped: 0,
            }
        };
        let done: Vec<Outcome> = study().plan().iter().map(done).collect();
        let rates = |count| {
            let best = study().plan_best(&done, count);
            best.iter().map(|settings| settings.lr).collect::<Vec<_>>()
        };
        assert_eq!(rates(1), [1e-3, 1e-1, 1e-3, 1e-1]);
        assert_eq!(rates(2)[..4], [1e-3, 1e-2, 1e-1, 1e-2]);
        assert!(study().plan_best(&[], 2).is_empty());
    }
}
