//! What is left of a run when its steps are forgotten; a study keeps one a line, as JSON.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::run::{Run, Step};
use crate::score::roughness;
use crate::settings::Settings;

/// How a run went. JSON has no NaN: what a diverged run lacks is `null`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// How it was to go.
    pub settings: Settings,
    /// Why it ended early, if it diverged.
    pub diverged: Option<String>,
    /// The test loss at the end.
    pub final_test_loss: Option<f64>,
    /// The lowest test loss.
    pub best_test_loss: Option<f64>,
    /// See [`roughness`].
    pub roughness: Option<f64>,
    /// The largest finite norm before clipping.
    pub max_total_norm: f64,
    /// The share of steps whose gradients clipping changed.
    pub clipped_fraction: f64,
    /// The number of skipped steps.
    pub num_skipped: usize,
    /// Mean time of a training step; not kept, so that a run that is repeated has the same line.
    #[serde(skip)]
    pub ms_per_step: f64,
}

impl From<&Run> for Outcome {
    /// A run that diverged has no loss, whatever it had reached before.
    fn from(run: &Run) -> Self {
        let losses = run.test_losses();
        let has_converged = run.diverged.is_none();
        let loss = |loss: Option<f64>| loss.filter(|loss| has_converged && loss.is_finite());
        let norms = run.steps.iter().map(|step| step.total_norm);
        let count = |is: fn(&Step) -> bool| run.steps.iter().filter(|step| is(step)).count();
        let steps = run.steps.len().max(1) as f64;
        Self {
            settings: run.settings.clone(),
            diverged: run.diverged.clone(),
            final_test_loss: loss(losses.last().copied()),
            best_test_loss: loss(losses.iter().copied().reduce(f64::min)),
            roughness: roughness(&losses).filter(|_| has_converged),
            max_total_norm: norms.filter(|norm| norm.is_finite()).fold(0.0, f64::max),
            clipped_fraction: count(|step| step.was_clipped) as f64 / steps,
            num_skipped: count(|step| step.skipped),
            ms_per_step: run.training_time.as_secs_f64() * 1e3 / steps,
        }
    }
}

impl Outcome {
    /// Of all runs that were not interrupted.
    #[must_use]
    pub fn of_finished(runs: &[Run]) -> Vec<Self> {
        let finished = runs.iter().filter(|run| !run.interrupted);
        finished.map(Self::from).collect()
    }
}

/// All runs in a file; none if there is no such file. A last line that a kill has cut off is
/// removed.
///
/// # Errors
/// If the file can't be read, or a line is no outcome.
pub fn read(path: &Path) -> Result<Vec<Outcome>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.with_context(|| format!("can't read `{}`", path.display()))?,
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    if whole.len() < text.len() {
        let file = File::options().write(true).open(path)?;
        file.set_len(whole.len() as u64)?;
    }
    let line = |(at, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("`{}`, line {}", path.display(), at + 1))
    };
    whole.lines().enumerate().map(line).collect()
}

/// Adds outcomes to a file, a line each. What can't be written, for a full disk, waits for the next
/// call.
#[derive(Debug)]
pub struct Writer<'a> {
    path: &'a Path,
    waiting: Vec<Outcome>,
}

impl<'a> Writer<'a> {
    /// Adds to this file.
    #[must_use]
    pub fn new(path: &'a Path) -> Self {
        let waiting = Vec::new();
        Self { path, waiting }
    }

    /// Adds an outcome.
    ///
    /// # Errors
    /// If it can't be written, for the first time in a row.
    pub fn add(&mut self, outcome: &Outcome) -> Result<()> {
        let is_first = self.waiting.is_empty();
        self.waiting.push(outcome.clone());
        self.write()
            .or_else(|error| if is_first { Err(error) } else { Ok(()) })
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// If it can't be written. No part of a line is left then.
    pub fn write(&mut self) -> Result<()> {
        while let Some(first) = self.waiting.first() {
            append(self.path, first)?;
            self.waiting.remove(0);
        }
        Ok(())
    }
}

fn append(path: &Path, outcome: &Outcome) -> Result<()> {
    let line = serde_json::to_string(outcome)? + "\n";
    let append = || {
        let mut file = File::options().create(true).append(true).open(path)?;
        let before = file.metadata()?.len();
        file.write_all(line.as_bytes()).inspect_err(|_| {
            // The next line would begin in the middle of this one.
            let _ = file.set_len(before);
        })
    };
    append().with_context(|| format!("can't write `{}`", path.display()))
}
