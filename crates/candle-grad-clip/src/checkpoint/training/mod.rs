//! Checkpoints of a whole training run: model, optimizer and the program's own state.

mod finite;
mod folder;
mod list;
mod manifest;
mod model;
mod restore;
mod save;

use std::fs;
use std::path::{Path, PathBuf};

use candle_nn::Optimizer;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::optimizer::ClippedOptimizer;
use crate::vars::NamedVars;
use folder::{discard, is_foreign, remove_leftovers};
use list::{Keep, first_whole, is_of, list, named, scan, sort_by_loss};
pub use restore::Checkpoint;
use save::{in_the_way, save};

/// The checkpoints of a training run, in one folder.
///
/// Each is a folder `step-000100` with everything that training needs to go on: weights, optimizer,
/// clip with its history, counters, loss scaler, and the program's own state. After
/// [`load_latest`](Self::load_latest) training goes on bit for bit as if it had never stopped.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_grad_clip::optim::AdamW;
/// use candle_grad_clip::{Checkpoints, Clip, ClippedOptimizer};
/// use candle_nn::{Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
///
/// /// Trains up to step `steps`, from wherever an earlier call ended. Returns the weights.
/// fn train(dir: &std::path::Path, steps: u64) -> anyhow::Result<Vec<Vec<f32>>> {
///     let mut varmap = VarMap::new();
///     let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
///     let model = candle_nn::linear(4, 1, vb)?;
///     let opt = AdamW::from_named_vars(&varmap, ParamsAdamW::default())?;
///     let mut opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?;
///
///     let checkpoints = Checkpoints::in_dir(dir)?.keep_last(3).keep_best(1);
///     let start = match checkpoints.load_latest(&mut varmap, &mut opt)? {
///         Some(checkpoint) => checkpoint.step(),
///         None => 0,
///     };
///     for step in start + 1..=steps {
///         let x = Tensor::full(step as f32, (8, 4), &Device::Cpu)?; // the batch of this step
///         let loss = model.forward(&x)?.sqr()?.mean_all()?;
///         opt.backward_step(&loss)?;
///         if step % 5 == 0 {
///             let loss = f64::from(loss.to_scalar::<f32>()?);
///             checkpoints.save_with_loss(step, loss, &varmap, &opt, &())?;
///         }
///     }
///     Ok(model.weight().to_vec2()?)
/// }
///
/// # fn main() -> anyhow::Result<()> {
/// # let dir = std::env::temp_dir().join(format!("candle-grad-clip-train-{}", std::process::id()));
/// train(&dir, 10)?;
/// let resumed = train(&dir, 20)?; // in another process, some day
/// assert_eq!(train(&dir, 20)?, resumed); // there is nothing left to do
/// # std::fs::remove_dir_all(dir)?;
/// # Ok(())
/// # }
/// ```
///
/// # What a program saves itself
/// `state` is any serde value: position in the data, random number generator, learning rate
/// schedule. It becomes JSON, which has no NaN and no infinity: `save` refuses these, so make a best
/// loss an `Option`. Functions are not saved: a
/// [`with_max_norm_schedule`](ClippedOptimizer::with_max_norm_schedule) or a
/// [`ClipRule`](crate::ClipRule) must be set again before `load_latest`. A
/// [`GradAccumulator`](crate::GradAccumulator) has no state between two steps: save there.
///
/// # Other optimizers
/// [`optim::AdamW`](crate::optim::AdamW) and [`optim::Sgd`](crate::optim::Sgd) are saved whole. Any
/// other optimizer's moments and step counters can't be read, so they **start anew** after
/// `load_latest`, which warns of it. Its learning rate, and all that belongs to the wrapper (clip
/// with its history, counters, loss scaler), are saved and restored. An inner `ClippedOptimizer` and
/// a [`GroupedOptimizer`](crate::optim::GroupedOptimizer) are other optimizers, too.
///
/// # Safety of the files
/// A checkpoint is written to a hidden folder beside the others, brought to the disk file by file,
/// and renamed. So a process that is killed, a full disk or a power cut leave the older checkpoints
/// whole, and no half one. What a killed process leaves (`.checkpoint-*.tmp`) is removed by the next
/// save. Processes that save to one folder at a time don't disturb each other: of one step, the
/// later one becomes `step-000100-2`. But [`keep_last`](Self::keep_last) counts the checkpoints of
/// all of them, so each run should have its own folder.
///
/// Nothing is removed but folders that have the marker file of this crate, and no file that is not
/// this crate's. By default not even those: see [`keep_last`](Self::keep_last).
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: Keep,
}

impl Checkpoints {
    /// The checkpoints in a folder, which is made if it is missing. Files of other names may be
    /// there too. All checkpoints are kept: see [`keep_last`](Self::keep_last).
    ///
    /// # Errors
    /// A folder that can't be made or read. Anything with the name of a checkpoint (`step-000100`)
    /// that this crate has not written.
    pub fn in_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref().to_path_buf();
        fs::create_dir_all(&dir).map_err(|source| Error::CheckpointIo {
            path: dir.clone(),
            source,
        })?;
        if let Some(path) = named(&dir)?.into_iter().find(|path| is_foreign(path)) {
            return Err(in_the_way(path));
        }
        Ok(Self {
            dir,
            keep: Keep::default(),
        })
    }

    /// Keeps only the last `count` checkpoints, and those of [`keep_best`](Self::keep_best). Older
    /// ones are removed after a new one is safely there. The newest is always kept. Two are better
    /// than one: if the newest gets damaged, `load_latest` goes back to the one before. A step that
    /// was saved twice counts once, and the later save is kept.
    ///
    /// Default: all are kept, and nothing is ever removed.
    #[must_use]
    pub fn keep_last(mut self, count: usize) -> Self {
        self.keep.last = Some(count);
        self
    }

    /// Also keeps the `count` checkpoints with the lowest loss, of those that were saved by
    /// [`save_with_loss`](Self::save_with_loss). Without [`keep_last`](Self::keep_last), these and
    /// the newest are kept.
    #[must_use]
    pub fn keep_best(mut self, count: usize) -> Self {
        self.keep.best = Some(count);
        self
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Saves a checkpoint, then removes older ones as [`keep_last`](Self::keep_last) says. Returns
    /// its folder. `step` is the number of steps done.
    ///
    /// `vars` are all Vars of the model with their names, such as `&varmap`. Some may not be
    /// trained. A Var with two names is saved under the first.
    ///
    /// # Errors
    /// [`Error::CheckpointIo`], for example for a full disk. Vars without names of their own (a
    /// `Vec<Var>`), or without one that `opt` trains. Weights that are NaN, or state of the
    /// optimizer that is NaN or infinite: a good checkpoint would be replaced by a ruined one. A
    /// state that JSON can't hold. Something else under the checkpoint's name. The older checkpoints
    /// then stay, and nothing of the new one does. Only after [`Error::CheckpointNotDurable`] the
    /// new one is in place.
    pub fn save<O: Optimizer + 'static>(
        &self,
        step: u64,
        vars: impl Into<NamedVars>,
        opt: &ClippedOptimizer<O>,
        state: &(impl Serialize + ?Sized),
    ) -> Result<PathBuf> {
        save(
            (&self.dir, self.keep),
            (step, None),
            &vars.into(),
            opt,
            state,
        )
    }

    /// Like [`save`](Self::save), with the loss by which [`keep_best`](Self::keep_best) and
    /// [`best`](Self::best) compare: the lower, the better. For a score of which more is better,
    /// pass its negative. A loss that is NaN or infinite is never among the best.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_with_loss<O: Optimizer + 'static>(
        &self,
        step: u64,
        loss: f64,
        vars: impl Into<NamedVars>,
        opt: &ClippedOptimizer<O>,
        state: &(impl Serialize + ?Sized),
    ) -> Result<PathBuf> {
        save(
            (&self.dir, self.keep),
            (step, Some(loss)),
            &vars.into(),
            opt,
            state,
        )
    }

    /// Restores the checkpoint that was saved last, and returns it. `None` if there is none.
    ///
    /// `vars` are the Vars that were saved, such as `&mut varmap`: their values are set in place.
    /// `opt` must be made as it was then, and gets back its hyper-parameters, its
    /// [`Clip`](crate::Clip) and the rest (see [`ClippedOptimizer::load`]).
    ///
    /// All files are checked against their checksums first. If one is damaged, the checkpoint
    /// before is taken, and a `tracing` warning says what was wrong.
    ///
    /// # Errors
    /// [`Error::CheckpointMismatch`] with all differences: a Var more or fewer, another shape or
    /// dtype, another optimizer. This is the program's fault, so no older checkpoint is tried.
    /// [`Error::CheckpointsDamaged`] if all are damaged. A file of a newer version of this crate, or
    /// without permission to read it. Nothing is changed then. Only if a device fails while all the
    /// new weights are set, some of them are.
    pub fn load_latest<O: Optimizer + 'static>(
        &self,
        vars: impl Into<NamedVars>,
        opt: &mut ClippedOptimizer<O>,
    ) -> Result<Option<Checkpoint>> {
        const TRIES: usize = 10;
        let vars = vars.into();
        let mut tries = 0;
        loop {
            let Some(latest) = self.latest()? else {
                return Ok(None);
            };
            tries += 1;
            match latest.install(&vars, opt) {
                // Another process has removed this one, and perhaps saved a newer one of its name.
                Err(_) if tries < TRIES && !is_of(&latest.path, latest.manifest.save) => {}
                installed => return installed.map(|()| Some(latest)),
            }
        }
    }

    /// The checkpoint that was saved last, without loading it: for a program that first needs its
    /// [`state`](Checkpoint::state), then makes the model, and then calls
    /// [`restore`](Checkpoint::restore). Checks and falls back like
    /// [`load_latest`](Self::load_latest).
    ///
    /// # Errors
    /// As [`load_latest`](Self::load_latest), apart from mismatches.
    pub fn latest(&self) -> Result<Option<Checkpoint>> {
        first_whole(&self.dir, |_| ())
    }

    /// The checkpoint with the lowest loss, of those that have one. Checks its files, and falls back
    /// to the next best.
    ///
    /// # Errors
    /// As [`latest`](Self::latest).
    pub fn best(&self) -> Result<Option<Checkpoint>> {
        first_whole(&self.dir, sort_by_loss)
    }

    /// All checkpoints, in the order in which they were saved. Their files are not checked, and
    /// those with a damaged manifest are left out.
    ///
    /// # Errors
    /// A folder that can't be read. A checkpoint of a newer version of this crate.
    pub fn list(&self) -> Result<Vec<Checkpoint>> {
        let mut all = list(&self.dir)?;
        all.reverse();
        Ok(all)
    }

    /// Removes all checkpoints, for a new run in the same folder. Those with files of others in them
    /// stay, like everything that is not a checkpoint.
    ///
    /// # Errors
    /// One that can't be removed.
    pub fn clear(&self) -> Result<()> {
        remove_leftovers(&self.dir);
        for found in scan(&self.dir)? {
            discard(&self.dir, &found.path).map_err(|source| Error::CheckpointIo {
                path: found.path,
                source,
            })?;
        }
        Ok(())
    }
}
