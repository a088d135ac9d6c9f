//! What this program has written, and so may replace or remove: folders with a marker file in them.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// The marker's name.
pub const MARKER: &str = ".oscillating-loss";

const TEXT: &str = "This folder is written by `oscillating-loss`, which replaces and removes its own files here.\n";

/// Whether a folder has the marker.
#[must_use]
pub fn is_marked(folder: &Path) -> bool {
    fs::symlink_metadata(folder.join(MARKER)).is_ok_and(|marker| marker.is_file())
}

/// Leaves the marker, if it is not there.
///
/// # Errors
/// If it can't be written.
pub fn mark(folder: &Path) -> io::Result<()> {
    match File::create_new(folder.join(MARKER)) {
        // Also an empty marker is one: a full disk leaves that.
        Ok(mut file) => file.write_all(TEXT.as_bytes()).or(Ok(())),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Which of these names are taken in a folder that lacks the marker: they belong to somebody else.
#[must_use]
pub fn in_the_way(folder: &Path, names: &[&str]) -> Vec<PathBuf> {
    if is_marked(folder) {
        return Vec::new();
    }
    let paths = names.iter().map(|name| folder.join(name));
    paths
        .filter(|path| fs::symlink_metadata(path).is_ok())
        .collect()
}

/// Whether this is a folder itself, not a link to one, that has the marker, and beside it only
/// files of these names.
#[must_use]
pub fn is_only(folder: &Path, names: &[&str]) -> bool {
    let known = |entry: io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| {
            let name = entry.file_name();
            let is_known = name == MARKER || names.iter().any(|known| name == *known);
            is_known && entry.file_type().is_ok_and(|kind| kind.is_file())
        })
    };
    is_marked_folder(folder) && fs::read_dir(folder).is_ok_and(|mut entries| entries.all(known))
}

/// Whether this is a folder itself, not a link to one, that has the marker.
#[must_use]
pub fn is_marked_folder(folder: &Path) -> bool {
    fs::symlink_metadata(folder).is_ok_and(|metadata| metadata.is_dir()) && is_marked(folder)
}

/// Removes a folder of ours with its files. What is not marked stays, and so does a folder that has
/// folders in it.
///
/// # Errors
/// If something can't be removed.
pub fn remove(folder: &Path) -> io::Result<()> {
    if !is_marked_folder(folder) {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name() != MARKER {
            fs::remove_file(entry.path())?;
        }
    }
    // Last: what a kill leaves of a folder is still known as ours.
    fs::remove_file(folder.join(MARKER))?;
    fs::remove_dir(folder)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_marked_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("folder");
        remove(&folder).unwrap();
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("a"), "").unwrap();
        assert_eq!(in_the_way(&folder, &["a", "b"]), [folder.join("a")]);
        remove(&folder).unwrap();
        assert!(folder.join("a").exists());

        mark(&folder).unwrap();
        mark(&folder).unwrap();
        assert!(in_the_way(&folder, &["a", "b"]).is_empty());
        assert!(is_only(&folder, &["a", "b"]));
        assert!(!is_only(&folder, &["b"]));
        fs::create_dir(folder.join("b")).unwrap();
        assert!(!is_only(&folder, &["a", "b"]));
        fs::remove_dir(folder.join("b")).unwrap();
        remove(&folder).unwrap();
        assert!(!folder.exists());
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_folder_of_ours_is_not_ours() {
        let parent = tempfile::tempdir().unwrap();
        let (folder, link) = (parent.path().join("folder"), parent.path().join("link"));
        fs::create_dir(&folder).unwrap();
        mark(&folder).unwrap();
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        assert!(!is_only(&link, &[]));
        remove(&link).unwrap();
        assert!(folder.join(MARKER).exists() && link.exists());
    }
}
