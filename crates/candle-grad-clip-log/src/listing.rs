//! The files of a folder.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The files in `dir` whose name `is_wanted`, in the order of their names.
pub(crate) fn files(dir: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let failure = || Error::io("read", dir);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(failure())? {
        let entry = entry.map_err(failure())?;
        if is_wanted(&entry.file_name().to_string_lossy()) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}
