//! The checkpoints in a folder: which there are, which are whole, and which are kept.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::folder::{discard, is_name, is_ours, is_there};
use super::manifest::{Flaw, Manifest, Sound};
use super::restore::Checkpoint;
use crate::error::{Error, Result};

/// A folder of ours with the name of a checkpoint.
pub(super) struct Found {
    pub(super) path: PathBuf,
    pub(super) manifest: Sound<Manifest>,
}

/// The paths with the name of a checkpoint.
pub(super) fn named(dir: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::CheckpointIo {
        path: dir.to_path_buf(),
        source,
    };
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        if entry.file_name().to_str().is_some_and(is_name) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

/// The checkpoints of a folder.
pub(super) fn scan(dir: &Path) -> Result<Vec<Found>> {
    let paths = named(dir)?.into_iter().filter(|path| is_ours(path));
    let found = |path: PathBuf| Found {
        manifest: Manifest::read(&path),
        path,
    };
    Ok(paths.map(found).collect())
}

/// The number of the next save.
pub(super) fn next_save(found: &[Found]) -> u64 {
    let manifests = found
        .iter()
        .filter_map(|found| found.manifest.as_ref().ok());
    let last = manifests.map(|manifest| manifest.save).max();
    last.unwrap_or(0).saturating_add(1)
}

/// The checkpoints of a folder by whether they have a manifest.
struct Readable {
    /// The newest first.
    listed: Vec<Checkpoint>,
    damaged: Vec<Damaged>,
}

struct Damaged {
    path: PathBuf,
    reason: String,
    /// [`Manifest::save`], if the manifest is whole.
    save: Option<u64>,
}

impl Damaged {
    /// Whether another process has removed it, or put a newer one of the same name in its place.
    fn is_gone(&self) -> bool {
        !is_there(&self.path) || self.save.is_some_and(|save| !is_of(&self.path, save))
    }
}

/// Whether the checkpoint of this save is in the folder.
pub(super) fn is_of(folder: &Path, save: u64) -> bool {
    Manifest::read(folder).is_ok_and(|manifest| manifest.save == save)
}

impl Readable {
    fn of(found: Vec<Found>) -> Result<Self> {
        let (mut listed, mut damaged) = (Vec::new(), Vec::new());
        for Found { path, manifest } in found {
            match manifest {
                Ok(manifest) => listed.push(Checkpoint { path, manifest }),
                Err(Flaw::Damage(reason)) => damaged.push(Damaged {
                    path,
                    reason,
                    save: None,
                }),
                Err(Flaw::Error(error)) => return Err(error),
            }
        }
        listed.sort_by_key(|checkpoint| Reverse(checkpoint.age()));
        Ok(Self { listed, damaged })
    }

    /// The first whole checkpoint. The damaged ones before it join the others.
    fn take_first_whole(&mut self) -> Result<Option<Checkpoint>> {
        for checkpoint in std::mem::take(&mut self.listed) {
            match checkpoint.manifest.verify(&checkpoint.path) {
                Ok(()) => return Ok(Some(checkpoint)),
                Err(Flaw::Error(error)) => return Err(error),
                Err(Flaw::Damage(reason)) => {
                    self.damaged.push(Damaged {
                        path: checkpoint.path,
                        reason,
                        save: Some(checkpoint.manifest.save),
                    });
                }
            }
        }
        Ok(None)
    }
}

/// The checkpoints that have a manifest, the newest first.
pub(super) fn list(dir: &Path) -> Result<Vec<Checkpoint>> {
    Ok(Readable::of(scan(dir)?)?.listed)
}

/// The first whole checkpoint, in the order that `sort` makes of the newest first. Warns about
/// damaged ones.
pub(super) fn first_whole(
    dir: &Path,
    sort: impl Fn(&mut Vec<Checkpoint>),
) -> Result<Option<Checkpoint>> {
    const TRIES: usize = 10;
    let mut tries = 0;
    let (whole, damaged) = loop {
        let mut readable = Readable::of(scan(dir)?)?;
        sort(&mut readable.listed);
        let whole = readable.take_first_whole()?;
        tries += 1;
        if tries == TRIES || !readable.damaged.iter().any(Damaged::is_gone) {
            break (whole, readable.damaged);
        }
    };
    let Some(whole) = whole else {
        if damaged.is_empty() {
            return Ok(None);
        }
        let damage = |Damaged { path, reason, .. }| format!("{}: {reason}", path.display());
        return Err(Error::CheckpointsDamaged {
            path: dir.to_path_buf(),
            damage: damaged.into_iter().map(damage).collect(),
        });
    };
    for Damaged { path, reason, .. } in damaged {
        tracing::warn!(
            damaged = %path.display(),
            reason,
            instead = %whole.path.display(),
            "a checkpoint is damaged: another one is taken instead"
        );
    }
    Ok(Some(whole))
}

/// Which checkpoints are kept. All, if nothing is set.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Keep {
    pub(super) last: Option<usize>,
    pub(super) best: Option<usize>,
}

impl Keep {
    /// Removes the others, after one was saved.
    pub(super) fn prune(self, dir: &Path, saved: &Path) -> Result<()> {
        if self.last.is_none() && self.best.is_none() {
            return Ok(());
        }
        let mut found = scan(dir)?;
        // Those of another version are not ours to judge.
        found.retain(|found| !matches!(found.manifest, Err(Flaw::Error(_))));
        let all: Vec<PathBuf> = found.iter().map(|found| found.path.clone()).collect();
        let mut listed = Readable::of(found)?.listed;
        // A later save of a step replaces the one before.
        let mut steps = HashSet::new();
        listed.retain(|checkpoint| steps.insert(checkpoint.step()));
        let last = self.last.unwrap_or(1).max(1);
        let mut kept: HashSet<PathBuf> = HashSet::from([saved.to_path_buf()]);
        kept.extend(
            listed
                .iter()
                .take(last)
                .map(|checkpoint| checkpoint.path.clone()),
        );
        sort_by_loss(&mut listed);
        let best = listed.iter().take(self.best.unwrap_or(0));
        kept.extend(best.map(|checkpoint| checkpoint.path.clone()));
        for path in all.iter().filter(|path| !kept.contains(*path)) {
            discard(dir, path).map_err(|source| Error::CheckpointIo {
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

/// Those with a loss, the best first; of two equal ones the newer.
pub(super) fn sort_by_loss(newest_first: &mut Vec<Checkpoint>) {
    newest_first.retain(|checkpoint| checkpoint.loss().is_some());
    let loss = |checkpoint: &Checkpoint| checkpoint.loss().unwrap_or(f64::INFINITY);
    newest_first.sort_by(|a, b| loss(a).total_cmp(&loss(b)));
}
