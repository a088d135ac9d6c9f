//! Checkpoints of a run, of which at any moment one is whole, even if the program is killed.
//!
//! A checkpoint is a folder `checkpoint-000100` in the run's, with 100 for the steps done:
//!
//! - `weights.safetensors`, `optimizer.safetensors`: the model, and the optimizer with its clipping
//! - `steps.csv`, `param_norms.csv`: what all steps did, for the files at the end
//! - `state.json`: how the run was called for, and the rest
//! - `crc32c.json`: a checksum of each of these
//! - `.oscillating-loss`: the [marker](crate::ours) of a folder that this program may remove
//!
//! It is made as `checkpoint.tmp`, brought to the disk file by file, and then renamed. Only after
//! that the one before goes, renamed first too, as half of one must not look like a whole. The
//! batches need no state: they are drawn again from the seed, up to the step.
//!
//! Other programs name their folders `checkpoint-500` too. What lacks the marker, or has more in it
//! than is listed here, is never removed; a run that is to leave checkpoints beside it is refused.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_grad_clip::{ClippedOptimizer, optim};
use serde::{Deserialize, Serialize};

use crate::ours;
use crate::param_norms::ParamNorms;
use crate::run::{Run, Step};
use crate::settings::Settings;
use crate::source::Source;

/// Changes with the files' meaning.
const FORMAT: u32 = 2;

const PREFIX: &str = "checkpoint-";
const UNFINISHED: &str = "checkpoint.tmp";
const REMOVED: &str = "checkpoint.old";

const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STEPS: &str = "steps.csv";
const PARAM_NORMS: &str = "param_norms.csv";
const STATE: &str = "state.json";
const CHECKSUMS: &str = "crc32c.json";
const CHECKED: [&str; 5] = [WEIGHTS, OPTIMIZER, STEPS, PARAM_NORMS, STATE];
const FILES: [&str; 6] = [WEIGHTS, OPTIMIZER, STEPS, PARAM_NORMS, STATE, CHECKSUMS];

/// `state.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    format: u32,
    /// How the run goes.
    pub settings: Settings,
    /// On what.
    pub source: Source,
    /// Steps between checkpoints.
    pub save_every: usize,
    /// See [`Run::missing`].
    missing: Vec<String>,
    /// See [`Run::training_time`].
    training_time: Duration,
}

/// A checkpoint that was found whole.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// How the run was called for.
    pub state: State,
    /// What the steps so far did.
    steps: Vec<Step>,
    /// The norms of their gradients.
    param_norms: ParamNorms,
}

impl Checkpoint {
    /// The newest of the run in the folder `out`.
    ///
    /// # Errors
    /// If there is none, or it is damaged.
    pub fn latest(out: &Path) -> Result<Self> {
        let mut found = list(out)?;
        found.retain(|(_, path)| ours::is_marked_folder(path));
        let Some((step, path)) = found.pop() else {
            bail!(
                "no checkpoint in `{}`: expected the folder of a run with --save-every",
                out.display()
            );
        };
        read(&path, step).with_context(|| {
            let advice = match found.pop() {
                Some((_, older)) => format!("remove it to go on from `{}`", older.display()),
                None => "start the run again, without --resume".to_owned(),
            };
            format!("can't go on from `{}` ({advice})", path.display())
        })
    }

    /// The steps done.
    #[must_use]
    pub fn step(&self) -> usize {
        self.steps.len()
    }

    /// What they did, as part of a run with these settings: where it is longer than it was to be,
    /// the evaluation at the former end goes.
    #[must_use]
    pub fn steps(&self, settings: &Settings) -> Vec<Step> {
        let keep = |step: &Step| Step {
            test_loss: step.test_loss.filter(|_| settings.evaluates(step.step)),
            ..*step
        };
        self.steps.iter().map(keep).collect()
    }

    /// Brings a run that has not begun, and its optimizer, to where the checkpoint is.
    fn restore<O: optim::Checkpoint>(
        &self,
        run: &mut Run,
        optimizer: &mut ClippedOptimizer<O>,
    ) -> Result<()> {
        let weights = self.path.join(WEIGHTS);
        let loaded = run.weights.0.load(&weights);
        loaded.with_context(|| format!("can't go on from `{}`", weights.display()))?;
        optimizer.load(self.path.join(OPTIMIZER))?;
        run.steps = self.steps(&run.settings);
        run.param_norms.clone_from(&self.param_norms);
        run.missing.clone_from(&self.state.missing);
        run.training_time = self.state.training_time;
        Ok(())
    }
}

/// Where a run leaves checkpoints, and how often.
#[derive(Debug)]
pub struct Checkpoints {
    /// The run's folder.
    pub out: PathBuf,
    /// Steps between them.
    pub save_every: usize,
    /// What the run trains on.
    pub source: Source,
    /// The one to go on from.
    pub resumed: Option<Checkpoint>,
}

impl Checkpoints {
    /// Goes to the checkpoint to resume from, or leaves the first, of a run before its first step.
    ///
    /// # Errors
    /// If a file doesn't fit the model, or can't be written.
    pub fn begin<O: optim::Checkpoint>(
        &self,
        run: &mut Run,
        optimizer: &mut ClippedOptimizer<O>,
    ) -> Result<()> {
        let Some(checkpoint) = &self.resumed else {
            return self.save(run, optimizer);
        };
        checkpoint.restore(run, optimizer)?;
        keep_only(Some(&checkpoint.path), &self.out)
    }

    /// Finds out, before training, whether checkpoints can be left here.
    ///
    /// # Errors
    /// If something that this program has not written has the name of a checkpoint.
    pub fn check(&self) -> Result<()> {
        let mut others: Vec<PathBuf> = list(&self.out)?.into_iter().map(|(_, path)| path).collect();
        others.retain(|path| !is_ours(path));
        for path in [UNFINISHED, REMOVED].map(|name| self.out.join(name)) {
            let is_there = fs::symlink_metadata(&path).is_ok();
            if is_there && !ours::is_marked_folder(&path) && fs::remove_dir(&path).is_err() {
                others.push(path);
            }
        }
        let names: Vec<String> = others
            .iter()
            .map(|path| format!("`{}`", path.display()))
            .collect();
        ensure!(
            names.is_empty(),
            "{} {} in the way of checkpoints, and not only of this program's making: move what you need, remove \
             the rest, or choose another folder with --out",
            names.join(", "),
            if names.len() == 1 { "is" } else { "are" }
        );
        Ok(())
    }

    /// Whether one is to be saved now: every so many steps, at the end, and when Ctrl-C ends the
    /// run.
    #[must_use]
    pub fn is_due(&self, run: &Run) -> bool {
        let step = run.steps.len();
        step.is_multiple_of(self.save_every) || step == run.settings.steps || run.interrupted
    }

    /// Saves one, then removes those before.
    ///
    /// # Errors
    /// If it can't be written; those before stay, and nothing of this one does.
    pub fn save<O: optim::Checkpoint>(
        &self,
        run: &Run,
        optimizer: &ClippedOptimizer<O>,
    ) -> Result<()> {
        let path = self.out.join(format!("{PREFIX}{:06}", run.steps.len()));
        let saved = self.save_as(&path, run, optimizer);
        if saved.is_err() {
            // The error that counts is the one of saving.
            let _ = ours::remove(&self.out.join(UNFINISHED));
        }
        saved.with_context(|| format!("can't save `{}`", path.display()))
    }

    fn save_as<O: optim::Checkpoint>(
        &self,
        path: &Path,
        run: &Run,
        optimizer: &ClippedOptimizer<O>,
    ) -> Result<()> {
        let unfinished = self.out.join(UNFINISHED);
        ours::remove(&unfinished)?;
        create(&unfinished)?;
        run.weights.0.save(unfinished.join(WEIGHTS))?;
        optimizer.save(unfinished.join(OPTIMIZER))?;
        write_steps(&unfinished.join(STEPS), &run.steps)?;
        run.param_norms.write_csv(&unfinished.join(PARAM_NORMS))?;
        let state = State {
            format: FORMAT,
            settings: run.settings.clone(),
            source: self.source.clone(),
            save_every: self.save_every,
            missing: run.missing.clone(),
            training_time: run.training_time,
        };
        fs::write(unfinished.join(STATE), serde_json::to_vec_pretty(&state)?)?;
        let sums = checksums(&unfinished)?;
        fs::write(
            unfinished.join(CHECKSUMS),
            serde_json::to_vec_pretty(&sums)?,
        )?;
        for name in FILES {
            let file = File::options().write(true).open(unfinished.join(name))?;
            file.sync_all()?;
        }
        sync_folder(&unfinished)?;
        fs::rename(&unfinished, path)?;
        sync_folder(&self.out)?;
        keep_only(Some(path), &self.out)
    }
}

/// Removes all checkpoints of an earlier run; what this program has not written stays.
///
/// # Errors
/// If one can't be removed.
pub fn clear(out: &Path) -> Result<()> {
    keep_only(None, out)
        .with_context(|| format!("can't remove old checkpoints from `{}`", out.display()))
}

/// Removes all other checkpoints, and what a kill has left of unfinished ones.
fn keep_only(path: Option<&Path>, out: &Path) -> Result<()> {
    let removed = out.join(REMOVED);
    ours::remove(&removed)?;
    for (_, other) in list(out)? {
        if path != Some(&other) && is_ours(&other) {
            fs::rename(other, &removed)?;
            ours::remove(&removed)?;
        }
    }
    Ok(ours::remove(&out.join(UNFINISHED))?)
}

/// Whether there is nothing in a checkpoint but what this program has written.
fn is_ours(path: &Path) -> bool {
    ours::is_only(path, &FILES)
}

/// Makes a folder of ours.
fn create(folder: &Path) -> Result<()> {
    match fs::create_dir(folder) {
        // A kill between the two calls leaves an empty folder.
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
        Err(error) if fs::read_dir(folder)?.next().is_some() => return Err(error.into()),
        _ => {}
    }
    ours::mark(folder).inspect_err(|_| {
        // Only removes an empty one.
        let _ = fs::remove_dir(folder);
    })?;
    Ok(())
}

/// What has the name of a checkpoint in a folder, with the steps, the newest last.
fn list(out: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let entries = fs::read_dir(out).with_context(|| format!("can't read `{}`", out.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if let Some(step) = step.and_then(|step| step.parse().ok()) {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

fn read(path: &Path, step: usize) -> Result<Checkpoint> {
    let expected: BTreeMap<String, u32> = read_json(&path.join(CHECKSUMS))?;
    for (name, sum) in checksums(path)? {
        ensure!(
            expected.get(name) == Some(&sum),
            "{name} is not what was saved: its checksum differs"
        );
    }
    let state: State = read_json(&path.join(STATE))?;
    ensure!(
        state.format == FORMAT,
        "its format is {}, expected {FORMAT}: it is of another version of this program",
        state.format
    );
    let steps = read_steps(&path.join(STEPS)).context(STEPS)?;
    ensure!(
        steps.iter().map(|step| step.step).eq(1..=step),
        "{STEPS} has {} steps, expected 1 to {step}",
        steps.len()
    );
    let param_norms = ParamNorms::read_csv(&path.join(PARAM_NORMS)).context(PARAM_NORMS)?;
    ensure!(
        param_norms.len() == step,
        "{PARAM_NORMS} has {} steps, expected {step}",
        param_norms.len()
    );
    Ok(Checkpoint {
        path: path.to_owned(),
        state,
        steps,
        param_norms,
    })
}

fn checksums(folder: &Path) -> Result<BTreeMap<&'static str, u32>> {
    let checksum = |name| {
        let bytes = fs::read(folder.join(name)).with_context(|| format!("can't read {name}"))?;
        Ok((name, crc32c::crc32c(&bytes)))
    };
    CHECKED.into_iter().map(checksum).collect()
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let name = path.file_name().unwrap_or_default().display().to_string();
    let bytes = fs::read(path).with_context(|| format!("can't read {name}"))?;
    serde_json::from_slice(&bytes).map_err(|error| anyhow!("{name}: {error}"))
}

/// CSV, as JSON has no NaN and no infinity; both formats keep every bit of other numbers.
fn write_steps(path: &Path, steps: &[Step]) -> Result<()> {
    let mut writer = csv::Writer::from_path(path)?;
    for step in steps {
        writer.serialize(step)?;
    }
    Ok(writer.flush()?)
}

fn read_steps(path: &Path) -> Result<Vec<Step>> {
    let steps = csv::Reader::from_path(path)?.into_deserialize();
    Ok(steps.collect::<csv::Result<_>>()?)
}

/// Brings names to the disk; Windows has no such thing for folders.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn steps_keep_every_bit() {
        let values = [
            0.1 + 0.2,
            5e-324,
            f64::MAX,
            -1.0 / 3.0,
            f64::INFINITY,
            f64::NEG_INFINITY,
            f64::NAN,
        ];
        let step = |(at, value): (usize, &f64)| Step {
            step: at + 1,
            train_loss: *value,
            test_loss: (at % 2 == 0).then_some(*value),
            total_norm: -value,
            clipped_norm: value / 3.0,
            clip_coef: 1.0,
            was_clipped: at % 3 == 0,
            skipped: at % 2 == 1,
        };
        let steps: Vec<Step> = values.iter().enumerate().map(step).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(STEPS);
        write_steps(&path, &steps).unwrap();
        let read = read_steps(&path).unwrap();
        assert_eq!(format!("{read:?}"), format!("{steps:?}"));
        write_steps(&path, &[]).unwrap();
        assert!(read_steps(&path).unwrap().is_empty());
    }
}
