//! A checkpoint, and how training resumes from it.

use std::any::type_name;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::TensorId;
use candle_nn::Optimizer;
use rustc_hash::FxHashSet;
use serde::de::DeserializeOwned;

use super::folder::{MODEL, OPTIMIZER, STATE};
use super::manifest::{Flaw, Manifest};
use super::model;
use crate::checkpoint::fault::join_names;
use crate::error::{Error, Result};
use crate::optim;
use crate::optimizer::ClippedOptimizer;
use crate::vars::NamedVars;

/// A checkpoint of [`Checkpoints`](crate::Checkpoints): a folder with these files.
///
/// | file | what it holds |
/// |---|---|
/// | `model.safetensors` | all Vars by name: for [`VarMap::load`](candle_nn::VarMap::load), for inference |
/// | `optimizer.safetensors` | what [`ClippedOptimizer::save`] writes |
/// | `state.json` | the program's own state |
/// | `manifest.json` | step, loss, and sizes and checksums of the other files |
///
/// A hidden file `.candle-grad-clip` marks the folder as one that [`Checkpoints`](crate::Checkpoints)
/// may remove. With any other file in it, the folder can still be loaded, and is never removed.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    pub(super) path: PathBuf,
    pub(super) manifest: Manifest,
}

impl Checkpoint {
    /// The step that it was saved after.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The loss that [`save_with_loss`](crate::Checkpoints::save_with_loss) was given. `None` if
    /// there was none, or if it was NaN or infinite.
    #[must_use]
    pub fn loss(&self) -> Option<f64> {
        self.manifest.loss
    }

    /// The checkpoint's folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the program's own state.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Checkpoints, Clip, ClippedOptimizer, optim::Sgd};
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let dir = std::env::temp_dir().join(format!("candle-grad-clip-state-{}", std::process::id()));
    /// # let vars = vec![("w".to_string(), Var::new(&[3f32, 4.0], &Device::Cpu)?)];
    /// # let sgd = Sgd::from_named_vars(vars.clone(), 0.1)?;
    /// # let opt = ClippedOptimizer::wrap(sgd, vars.clone(), Clip::norm(1.0))?;
    /// let (epoch, seed) = (3, 17);
    /// let checkpoints = Checkpoints::in_dir(&dir)?;
    /// checkpoints.save(100, vars, &opt, &(epoch, seed))?;
    /// let newest = checkpoints.latest()?.unwrap();
    /// assert_eq!(newest.state::<(u32, u64)>()?, (3, 17));
    /// # let _ = std::fs::remove_dir_all(dir);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A state of another type. A file that is damaged or can't be read.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T> {
        let verified = self.manifest.verify_file(&self.path, STATE);
        verified.map_err(|flaw| self.error(flaw))?;
        let path = self.path.join(STATE);
        let bytes = fs::read(&path).map_err(|source| Error::CheckpointIo {
            path: path.clone(),
            source,
        })?;
        serde_json::from_slice(&bytes).map_err(|error| Error::Checkpoint {
            path,
            reason: format!("the state is no {}: {error}", type_name::<T>()),
        })
    }

    /// Restores Vars and optimizer, like [`Checkpoints::load_latest`](crate::Checkpoints::load_latest)
    /// but from this checkpoint.
    ///
    /// # Errors
    /// A damaged file. [`Error::CheckpointMismatch`] with all differences. Nothing is changed then.
    pub fn restore<O: Optimizer + 'static>(
        &self,
        vars: impl Into<NamedVars>,
        opt: &mut ClippedOptimizer<O>,
    ) -> Result<()> {
        let verified = self.manifest.verify(&self.path);
        verified.map_err(|flaw| self.error(flaw))?;
        self.install(&vars.into(), opt)
    }

    /// Like [`restore`](Self::restore), if the files are known to be whole.
    pub(super) fn install<O: Optimizer + 'static>(
        &self,
        vars: &NamedVars,
        opt: &mut ClippedOptimizer<O>,
    ) -> Result<()> {
        check_covers(&self.path, vars, opt)?;
        let values = model::read(&self.path.join(MODEL), vars)?;
        let staged = opt.stage(&self.path.join(OPTIMIZER))?;
        // All is read and checked. Only a device can fail now.
        for (var, value) in values {
            var.set(&value)?;
        }
        opt.install(staged);
        if optim::fused_ref(&opt.inner).is_empty() {
            tracing::warn!(
                optimizer = type_name::<O>(),
                checkpoint = %self.path.display(),
                "this optimizer's own state (moments, step counter) can't be saved: it starts anew; weights, clip, \
                 counters, loss scale and learning rate are restored (optim::AdamW and optim::Sgd restore all)"
            );
        }
        Ok(())
    }

    fn error(&self, flaw: Flaw) -> Error {
        match flaw {
            Flaw::Error(error) => error,
            Flaw::Damage(reason) => Error::Checkpoint {
                path: self.path.clone(),
                reason,
            },
        }
    }

    /// Orders checkpoints from the oldest to the newest.
    pub(super) fn age(&self) -> (u64, u64) {
        (self.manifest.save, self.manifest.step)
    }
}

/// An error if the optimizer trains a Var that is not among these: its weights would be missing.
pub(super) fn check_covers<O: Optimizer + 'static>(
    path: &Path,
    vars: &NamedVars,
    opt: &ClippedOptimizer<O>,
) -> Result<()> {
    let given: FxHashSet<TensorId> = vars.vars().iter().map(|var| var.id()).collect();
    let fused = optim::fused_ref(&opt.inner).into_iter();
    let trained = fused.map(|fused| fused.trained().vars());
    let mut missing = Vec::new();
    for trained in trained.chain([&opt.core.vars]) {
        for (name, var) in trained.names().iter().zip(trained.vars()) {
            let name = format!("{name:?}");
            if !given.contains(&var.id()) && !missing.contains(&name) {
                missing.push(name);
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Checkpoint {
        path: path.to_path_buf(),
        reason: format!(
            "the optimizer trains Vars that are not among those of the model: {}; expected the whole model, such as its \
             VarMap",
            join_names(&missing)
        ),
    })
}
