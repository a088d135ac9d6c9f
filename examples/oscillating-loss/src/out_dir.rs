//! The folder that results go to; every file in it is written whole.
//!
//! It has the [marker](crate::ours): in a folder without one, files of our names are somebody
//! else's, such as the `config.json` of a model, and are not replaced.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::ours;

/// Room that must be there before training starts: more than all files of the story need.
const PROBE_BYTES: usize = 8 << 20;

/// What commands write into the folder.
const FILES: [&str; 8] = [
    "config.json",
    "metrics.csv",
    "summary.json",
    "loss.svg",
    "grad_norm.svg",
    "sweep.svg",
    "runs.jsonl",
    "tables.md",
];

/// What they write into the folder of an arm.
const FILES_OF_ARM: [&str; 3] = ["weights.safetensors", "param_norms.csv", "param_norms.svg"];

/// A folder that has been written to.
#[derive(Debug, Clone)]
pub struct OutDir {
    path: PathBuf,
}

impl OutDir {
    /// Makes the folder if need be, and finds out now, not after training, whether files can be
    /// written there.
    ///
    /// # Errors
    /// If the path is no folder, is read-only, has less than 8 MiB left, or has files that would be
    /// replaced, but were not written by this program.
    pub fn create(path: &Path) -> Result<Self> {
        check(path, &FILES)?;
        // The probe has no name: nobody's file is replaced by it, and a kill leaves nothing.
        let written = fs::create_dir_all(path)
            .and_then(|()| tempfile::tempfile_in(path))
            .and_then(|probe| write_synced(probe, &vec![0; PROBE_BYTES]))
            .and_then(|()| ours::mark(path));
        written.with_context(|| {
            format!(
                "can't write to `{}`: choose another folder with --out",
                path.display()
            )
        })?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of an arm inside.
    ///
    /// # Errors
    /// If it can't be made, or has files that would be replaced, but were not written by this
    /// program.
    pub fn folder(&self, name: &str) -> Result<Self> {
        let path = self.path.join(name);
        check(&path, &FILES_OF_ARM)?;
        fs::create_dir_all(&path)
            .and_then(|()| ours::mark(&path))
            .with_context(|| format!("can't make `{}`", path.display()))?;
        Ok(Self { path })
    }

    /// Writes a file under a temporary name, then gives it its own: nobody ever sees half of it.
    ///
    /// # Errors
    /// If `write` fails or the file can't be moved in place.
    pub fn write(&self, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (path, partial) = (
            self.path.join(name),
            self.path.join(format!(".{name}.partial")),
        );
        let written = write(&partial).and_then(|()| {
            File::open(&partial)?.sync_all()?;
            Ok(fs::rename(&partial, &path)?)
        });
        if written.is_err() {
            // The error that counts is the one of writing.
            let _ = fs::remove_file(&partial);
        }
        written.with_context(|| format!("can't write `{}`", path.display()))
    }

    /// Writes a value as indented JSON.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_json(&self, name: &str, value: &impl serde::Serialize) -> Result<()> {
        let json = serde_json::to_string_pretty(value)?;
        self.write(name, |path| Ok(fs::write(path, json + "\n")?))
    }
}

/// Whether files of these names would be ours to replace.
fn check(folder: &Path, names: &[&str]) -> Result<()> {
    let others: Vec<String> = ours::in_the_way(folder, names)
        .iter()
        .map(|path| format!("`{}`", path.display()))
        .collect();
    ensure!(
        others.is_empty(),
        "{} would be replaced, but this program has not written that (there is no `{}` beside it): choose another \
         folder with --out",
        others.join(", "),
        ours::MARKER
    );
    Ok(())
}

fn write_synced(mut file: File, bytes: &[u8]) -> std::io::Result<()> {
    file.write_all(bytes)?;
    file.sync_all()
}
