//! The checkpoints of a run: what the library saves, and how the run was called for.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_grad_clip::{Checkpoint, Checkpoints, ClippedOptimizer};
use candle_nn::Optimizer;
use serde::{Deserialize, Serialize};

use crate::run::Run;
use crate::settings::Settings;
use crate::source::Source;

/// The caller's part of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    settings: Settings,
    source: Source,
    save_every: usize,
    missing: Vec<String>,
    training_time: Duration,
}

/// Where a run leaves checkpoints, and how often.
#[derive(Debug)]
pub struct Saves {
    store: Checkpoints,
    every: usize,
    /// What the run trains on.
    pub source: Source,
    resumed: Option<Checkpoint>,
}

impl Saves {
    /// For a new run. Checkpoints of an earlier one are removed.
    ///
    /// # Errors
    /// If that fails, or files of others are in the way.
    pub fn begin(out: &Path, every: usize, source: Source) -> Result<Self> {
        let store = store(out)?;
        store.clear()?;
        Ok(Self {
            store,
            every,
            source,
            resumed: None,
        })
    }

    /// For the run whose checkpoints are in `out`, and how it was called for.
    ///
    /// # Errors
    /// If there is no whole checkpoint, or the run's data have changed.
    pub fn resume(out: &Path, every: Option<usize>) -> Result<(Settings, Self)> {
        let none = || {
            let out = out.display();
            format!("no checkpoint in `{out}`: expected the folder of a run with --save-every")
        };
        ensure!(out.join(FOLDER).is_dir(), none());
        let store = store(out)?;
        let latest = store.latest()?.with_context(none)?;
        let state: State = latest.state()?;
        state.source.check_unchanged()?;
        let saves = Self {
            store,
            every: every.unwrap_or(state.save_every),
            source: state.source,
            resumed: Some(latest),
        };
        Ok((state.settings, saves))
    }

    /// The steps done before the break, of a resumed run.
    #[must_use]
    pub fn resumed(&self) -> Option<usize> {
        let checkpoint = self.resumed.as_ref();
        checkpoint.map(|checkpoint| checkpoint.step() as usize)
    }

    /// Restores the checkpoint to resume from, or leaves the first, of a run before its first step.
    ///
    /// # Errors
    /// If a file doesn't fit the model, or can't be written.
    pub fn start<O: Optimizer + 'static>(
        &self,
        run: &mut Run,
        optimizer: &mut ClippedOptimizer<O>,
    ) -> Result<()> {
        let Some(checkpoint) = &self.resumed else {
            return self.try_save(run, optimizer);
        };
        checkpoint.restore(&run.weights, optimizer)?;
        let state: State = checkpoint.state()?;
        run.missing = state.missing;
        run.training_time = state.training_time;
        Ok(())
    }

    /// Whether a checkpoint is due: every so many steps, at the end, and when Ctrl-C ends the run.
    #[must_use]
    pub fn is_due(&self, run: &Run) -> bool {
        let step = run.steps.len();
        step.is_multiple_of(self.every) || step == run.settings.steps || run.interrupted
    }

    /// Saves one. What the run has done so far is worth more than a checkpoint: a failure is kept
    /// in [`Run::unsaved`].
    pub fn save<O: Optimizer + 'static>(&self, run: &mut Run, optimizer: &ClippedOptimizer<O>) {
        let failed = self.try_save(run, optimizer).err();
        if let (Some(error), None) = (&failed, &run.unsaved) {
            eprintln!("warning: {error:#}; the one before stays, and training goes on");
        }
        run.unsaved = failed;
    }

    fn try_save<O: Optimizer + 'static>(
        &self,
        run: &Run,
        optimizer: &ClippedOptimizer<O>,
    ) -> Result<()> {
        let state = State {
            settings: run.settings.clone(),
            source: self.source.clone(),
            save_every: self.every,
            missing: run.missing.clone(),
            training_time: run.training_time,
        };
        let step = run.steps.len() as u64;
        self.store.save(step, &run.weights, optimizer, &state)?;
        Ok(())
    }
}

/// In the folder of the run.
const FOLDER: &str = "checkpoints";

fn store(out: &Path) -> Result<Checkpoints> {
    Ok(Checkpoints::in_dir(out.join(FOLDER))?.keep_last(1))
}
