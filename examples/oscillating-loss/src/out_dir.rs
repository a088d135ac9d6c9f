//! The folder that results go to; every file in it is written whole.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Room that must be there before training starts: more than all files of the story need.
const PROBE_BYTES: usize = 8 << 20;

/// The file that tells a folder of this program from others.
pub const MARKER: &str = ".oscillating-loss";

/// A folder that has been written to.
#[derive(Debug, Clone)]
pub struct OutDir(PathBuf);

impl OutDir {
    /// Makes the folder if need be, and finds out now, not after training, whether files can be
    /// written there.
    ///
    /// # Errors
    /// If the path is no folder, is read-only, has less than 8 MiB left, or has files that this
    /// program did not write.
    pub fn create(path: &Path) -> Result<Self> {
        let is_empty = fs::read_dir(path).map_or(true, |mut entries| entries.next().is_none());
        ensure!(
            is_empty || path.join(MARKER).is_file(),
            "`{}` has files that this program did not write (there is no `{MARKER}` in it): choose \
             another folder with --out",
            path.display()
        );
        // The probe has no name: nobody's file is replaced by it, and a kill leaves nothing.
        let written = fs::create_dir_all(path)
            .and_then(|()| tempfile::tempfile_in(path))
            .and_then(|mut probe| probe.write_all(&vec![0; PROBE_BYTES]).and(probe.sync_all()))
            .and_then(|()| fs::write(path.join(MARKER), ""));
        written.with_context(|| {
            format!(
                "can't write to `{}`: choose another folder with --out",
                path.display()
            )
        })?;
        Ok(Self(path.to_owned()))
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file under a temporary name, then gives it its own: nobody ever sees half of it.
    ///
    /// # Errors
    /// If `write` fails or the file can't be moved in place.
    pub fn write(&self, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let path = self.0.join(name);
        let partial = self.0.join(format!("{name}.partial"));
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
