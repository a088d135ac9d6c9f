//! What all commands share: data, settings, where results go, and whether to stop.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use candle_grad_clip_log::RunLog;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::arm::Arm;
use crate::baseline::Baselines;
use crate::data::Weather;
use crate::metrics;
use crate::out_dir::OutDir;
use crate::outcome::Outcome;
use crate::parallel::for_each;
use crate::run::Run;
use crate::settings::Settings;
use crate::standing::Standing;
use crate::train::{Extras, train};

/// One call of the program.
#[derive(Debug)]
pub struct Experiment<'a> {
    /// Windows to train and to test on.
    pub weather: Weather,
    /// Losses that need no model.
    pub baselines: Baselines,
    /// What the runs have in common; commands change arm, learning rate and seed.
    pub base: Settings,
    /// Where files go.
    pub out: OutDir,
    /// Set by Ctrl-C and SIGTERM.
    pub interrupt: &'a AtomicBool,
}

impl<'a> Experiment<'a> {
    /// Puts it together, before anything is trained.
    ///
    /// # Errors
    /// If the data are not what [`Weather`] says.
    pub fn new(
        weather: Weather,
        base: Settings,
        out: OutDir,
        interrupt: &'a AtomicBool,
    ) -> Result<Self> {
        let baselines = Baselines::new(&weather.test, base.power, base.alpha)?;
        Ok(Self {
            weather,
            baselines,
            base,
            out,
            interrupt,
        })
    }

    /// The common settings with another arm, learning rate and seed.
    #[must_use]
    pub fn settings(&self, arm: &Arm, lr: f64, seed: u64) -> Settings {
        Settings {
            arm: arm.clone(),
            lr,
            seed,
            ..self.base.clone()
        }
    }

    /// Whether Ctrl-C was pressed, or SIGTERM came.
    #[must_use]
    pub fn interrupted(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
    }

    /// Trains with each of the settings, several at a time, and returns the runs in their order.
    /// After an interrupt, those that had begun are returned as far as they got.
    ///
    /// # Errors
    /// The first error of any run or `log`, which makes a run's log.
    pub fn train_all(
        &self,
        plan: &[Settings],
        log: impl Fn(&Settings) -> Result<Option<RunLog>> + Sync,
    ) -> Result<Vec<Run>> {
        let bar = runs_bar(plan.len(), self.base.steps);
        let device = self.weather.train.x.device();
        let runs = for_each(plan.len(), device, self.interrupt, |at| {
            let extras = Extras {
                log: log(&plan[at])?,
                ..Extras::default()
            };
            train(&plan[at], &self.weather, self.interrupt, extras, |_, _| {
                bar.inc(1);
                Ok(())
            })
        });
        bar.finish_and_clear();
        runs
    }

    /// Writes `config.json`: what is about to be run.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn write_config(&self, command: &str, plan: &[Settings]) -> Result<()> {
        let config = json!({
            "command": command,
            "version": env!("CARGO_PKG_VERSION"),
            "device": format!("{:?}", self.weather.train.x.device().location()),
            "features": self.weather.features,
            "train_windows": self.weather.train.len(),
            "test_windows": self.weather.test.len(),
            "runs": plan,
        });
        self.out.write_json("config.json", &config)
    }

    /// Writes `metrics.csv` and `summary.json`, whether the runs came to their end or not.
    ///
    /// # Errors
    /// If one can't be written; the other is written all the same.
    pub fn write_results(&self, runs: &[Run]) -> Result<()> {
        let metrics = self
            .out
            .write("metrics.csv", |path| metrics::write_csv(path, runs));
        let summary = self.out.write_json("summary.json", &self.summary(runs));
        metrics.and(summary)
    }

    /// Numbers that are not finite become `null`.
    fn summary(&self, runs: &[Run]) -> Value {
        let outcomes = Outcome::of_finished(runs);
        let standings = Standing::of_arms(&outcomes, |run| run.best_test_loss);
        let arms = || standings.iter().map(|standing| standing.arm.to_string());
        let decades = standings.iter().map(Standing::usable_decades);
        let losses = standings.iter().map(|standing| standing.best.1);
        let usable_lr_decades: BTreeMap<String, f64> = arms().zip(decades).collect();
        let best_test_loss: BTreeMap<String, f64> = arms().zip(losses).collect();
        json!({
            "arms": runs.iter().map(|run| of_run(&Outcome::from(run))).collect::<Vec<_>>(),
            "usable_lr_decades": usable_lr_decades,
            "best_test_loss": best_test_loss,
            "baselines": self.baselines,
        })
    }
}

/// One bar for runs of the same length.
#[must_use]
pub fn runs_bar(runs: usize, steps: usize) -> ProgressBar {
    let bar = ProgressBar::new((runs * steps) as u64);
    let style = ProgressStyle::with_template("{bar:42} {pos} of {len} steps, {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn of_run(run: &Outcome) -> Value {
    let settings = &run.settings;
    json!({
        "arm": settings.arm,
        "optimizer": settings.optimizer,
        "momentum": settings.momentum,
        "power": settings.power,
        "lr": settings.lr,
        "seed": settings.seed,
        "final_test_loss": run.final_test_loss,
        "best_test_loss": run.best_test_loss,
        "roughness": run.roughness,
        "max_total_norm": run.max_total_norm,
        "clipped_fraction": run.clipped_fraction,
        "diverged": run.diverged.is_some(),
        "ms_per_step": run.ms_per_step,
    })
}
