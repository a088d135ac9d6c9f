//! What all commands share: data, settings, where results go, and whether to stop.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use serde_json::json;

use crate::arm::Arm;
use crate::baseline::Baselines;
use crate::data::Weather;
use crate::late::Late;
use crate::metrics;
use crate::out_dir::OutDir;
use crate::parallel::{Watch, train_all};
use crate::run::Run;
use crate::settings::Settings;
use crate::summary::Summary;

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

    /// Trains with each of the settings; see [`train_all`].
    ///
    /// # Errors
    /// As [`train_all`].
    pub fn train_all(&self, settings: &[Settings], watch: &impl Watch) -> Result<Vec<Run>> {
        train_all(settings, &self.weather, self.interrupt, watch)
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
        let mut late = Late::default();
        late.keep(
            self.out
                .write("metrics.csv", |path| metrics::write_csv(path, runs)),
        );
        let summary = Summary::new(runs, self.baselines);
        late.keep(self.out.write_json("summary.json", &summary));
        late.end()
    }
}
