//! The folder that results go to; every file in it is written whole.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Room that must be there before training starts: more than all files of the story need.
const PROBE_BYTES: usize = 8 << 20;

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
    /// If the path is no folder, is read-only, or has less than 8 MiB left.
    pub fn create(path: &Path) -> Result<Self> {
        let probe = path.join(".probe");
        let written =
            fs::create_dir_all(path).and_then(|()| write_synced(&probe, &vec![0; PROBE_BYTES]));
        // Whatever part of it there is; the error that counts is the one of writing.
        let _ = fs::remove_file(&probe);
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

    /// A folder inside.
    ///
    /// # Errors
    /// If it can't be made.
    pub fn folder(&self, name: &str) -> Result<Self> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("can't make `{}`", path.display()))?;
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

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
