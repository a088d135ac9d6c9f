//! Saving a checkpoint: beside the others, then under its name.

use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use candle_nn::Optimizer;
use serde::Serialize;

use super::finite::check_finite;
use super::folder::{
    MODEL, OPTIMIZER, STATE, Unfinished, create_file, is_foreign, is_there, name_of,
    remove_leftovers,
};
use super::list::{Keep, next_save, scan};
use super::manifest::Manifest;
use super::model;
use super::restore::check_covers;
use crate::checkpoint::atomic_write::sync_folder;
use crate::checkpoint::fault::Checked;
use crate::error::{Error, Result};
use crate::optimizer::ClippedOptimizer;
use crate::vars::NamedVars;

/// Saves a checkpoint, then removes those that are not kept. Returns its folder.
pub(super) fn save<O: Optimizer + 'static>(
    (dir, keep): (&Path, Keep),
    (step, loss): (u64, Option<f64>),
    vars: &NamedVars,
    opt: &ClippedOptimizer<O>,
    state: &(impl Serialize + ?Sized),
) -> Result<PathBuf> {
    let path = free_path(dir, step)?;
    check_covers(&path, vars, opt)?;
    remove_leftovers(dir);
    let mut folder = Unfinished::create(dir).map_err(|source| io_error(&path, source))?;
    let written = write_files(&folder, vars, opt, state)
        .and_then(|()| finish(&folder, dir, (step, loss)).map_err(|fault| fault.at(&path)));
    written.map_err(|error| at_final_path(error, folder.path(), &path))?;
    let path = rename(&mut folder, dir, path, step)?;
    sync_folder(dir).map_err(|source| Error::CheckpointNotDurable {
        path: path.clone(),
        source,
    })?;
    if let Err(error) = keep.prune(dir, &path) {
        tracing::warn!(%error, "an old checkpoint could not be removed; the new one is saved");
    }
    Ok(path)
}

/// Writes the manifest.
fn finish(folder: &Unfinished, dir: &Path, (step, loss): (u64, Option<f64>)) -> Checked<()> {
    let save = next_save(&scan(dir)?);
    Manifest::of(folder.path(), step, save, loss)?.write(folder.path())?;
    Ok(sync_folder(folder.path())?)
}

/// A path for a checkpoint of this step.
fn free_path(dir: &Path, step: u64) -> Result<PathBuf> {
    let mut copy = 1;
    loop {
        let path = dir.join(name_of(step, copy));
        if is_foreign(&path) {
            return Err(in_the_way(path));
        }
        if !is_there(&path) {
            return Ok(path);
        }
        copy += 1;
    }
}

/// Gives the folder its name, or the next one if another process took it.
fn rename(folder: &mut Unfinished, dir: &Path, mut path: PathBuf, step: u64) -> Result<PathBuf> {
    const TRIES: usize = 100;
    let mut tries = 0;
    loop {
        let Err(source) = folder.rename(&path) else {
            return Ok(path);
        };
        tries += 1;
        // The other one may be gone again.
        let is_taken = matches!(
            source.kind(),
            ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists
        );
        if tries == TRIES || !(is_taken || is_there(&path)) {
            return Err(io_error(&path, source));
        }
        path = free_path(dir, step)?;
    }
}

fn write_files<O: Optimizer + 'static>(
    folder: &Unfinished,
    vars: &NamedVars,
    opt: &ClippedOptimizer<O>,
    state: &(impl Serialize + ?Sized),
) -> Result<()> {
    model::save(&folder.join(MODEL), vars)?;
    opt.write(&folder.join(OPTIMIZER), false, create_file)?;
    let path = folder.join(STATE);
    let unsaved = |reason: String| Error::Checkpoint {
        path: path.clone(),
        reason: format!("the state can't be saved: {reason}"),
    };
    check_finite(state).map_err(unsaved)?;
    let json = serde_json::to_vec_pretty(state).map_err(|error| unsaved(error.to_string()))?;
    let write = |out: &mut BufWriter<File>| Ok(out.write_all(&json)?);
    create_file(&path, &mut { write }).map_err(|fault| fault.at(&path))
}

fn io_error(path: &Path, source: io::Error) -> Error {
    Error::CheckpointIo {
        path: path.to_path_buf(),
        source,
    }
}

pub(super) fn in_the_way(path: PathBuf) -> Error {
    Error::Checkpoint {
        path,
        reason: "in the way of checkpoints is something that candle-grad-clip has not written, and that stays: move it, or \
                 choose another folder"
            .to_string(),
    }
}

/// The error with the path that the user expects.
fn at_final_path(mut error: Error, unfinished: &Path, path: &Path) -> Error {
    if let Error::CheckpointIo { path: at, .. } | Error::Checkpoint { path: at, .. } = &mut error
        && let Ok(file) = at.strip_prefix(unfinished)
    {
        *at = path.join(file);
    }
    error
}
