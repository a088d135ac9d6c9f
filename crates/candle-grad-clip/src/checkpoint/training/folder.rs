//! The folders of checkpoints: their names, whose they are, and how they come and go.
//!
//! A folder is ours if it has our marker. It is removed only if there is nothing else in it but our
//! files.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::checkpoint::atomic_write::random_name;
use crate::checkpoint::fault::Checked;
use crate::checkpoint::file::BUFFER_BYTES;

pub(super) const MODEL: &str = "model.safetensors";
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
pub(super) const STATE: &str = "state.json";
pub(super) const MANIFEST: &str = "manifest.json";
const FILES: [&str; 4] = [MODEL, OPTIMIZER, STATE, MANIFEST];

/// The file that says whose a folder is. While a checkpoint is written, its process holds a lock on
/// it, which ends with the process.
const MARKER: &str = ".candle-grad-clip";
const MARKER_TEXT: &str = "candle-grad-clip writes and removes this folder.\n";

/// The name of the folder of a step: `step-000100`. A later save of the same step is a copy:
/// `step-000100-2`.
pub(super) fn name_of(step: u64, copy: u64) -> String {
    match copy {
        1 => format!("step-{step:06}"),
        _ => format!("step-{step:06}-{copy}"),
    }
}

/// Whether this is the name of a checkpoint.
pub(super) fn is_name(name: &str) -> bool {
    let numbers = name.strip_prefix("step-");
    let (step, copy) =
        match numbers.map(|numbers| numbers.split_once('-').unwrap_or((numbers, "1"))) {
            Some((step, copy)) => (step.parse(), copy.parse()),
            None => return false,
        };
    matches!((step, copy), (Ok(step), Ok(copy)) if name_of(step, copy) == name)
}

/// The name of a folder that is being written or removed.
fn unfinished_name() -> String {
    format!(".checkpoint-{}.tmp", random_name())
}

fn is_unfinished_name(name: &str) -> bool {
    let number = name.strip_prefix(".checkpoint-");
    let number = number.and_then(|rest| rest.strip_suffix(".tmp"));
    number.is_some_and(|hex| hex.len() == 32 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Whether something is there, be it a link to nothing.
pub(super) fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Whether this is a folder itself, not a link to one, with our marker.
pub(super) fn is_ours(folder: &Path) -> bool {
    fs::symlink_metadata(folder).is_ok_and(|metadata| metadata.is_dir())
        && fs::symlink_metadata(folder.join(MARKER)).is_ok_and(|marker| marker.is_file())
}

/// Whether something is there that is not ours. Another process may remove or make a folder of ours
/// in between.
pub(super) fn is_foreign(path: &Path) -> bool {
    !is_ours(path) && is_there(path) && !is_ours(path)
}

/// Whether a folder is ours, and has nothing in it but our files.
pub(super) fn is_only_ours(folder: &Path) -> bool {
    let known = |entry: io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| {
            let name = entry.file_name();
            let is_known = name == MARKER || FILES.iter().any(|known| name == *known);
            is_known && entry.file_type().is_ok_and(|kind| kind.is_file())
        })
    };
    is_ours(folder) && fs::read_dir(folder).is_ok_and(|mut entries| entries.all(known))
}

/// Removes a checkpoint, if there is nothing in it that is not ours. A kill leaves all of it, or a
/// folder that counts as unfinished.
pub(super) fn discard(dir: &Path, folder: &Path) -> io::Result<()> {
    if !is_only_ours(folder) {
        return Ok(());
    }
    let removed = dir.join(unfinished_name());
    match fs::rename(folder, &removed) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()), // another process was faster
        Err(error) => Err(error),
        Ok(()) => remove_files(&removed),
    }
}

/// Removes our files, then the folder.
fn remove_files(folder: &Path) -> io::Result<()> {
    // The marker last: what a kill leaves is known as ours, or empty.
    for name in FILES.into_iter().chain([MARKER]) {
        unless_gone(fs::remove_file(folder.join(name)))?;
    }
    unless_gone(fs::remove_dir(folder))
}

fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes what killed processes left of checkpoints that they wrote or removed.
pub(super) fn remove_leftovers(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder && entry.file_name().to_str().is_some_and(is_unfinished_name) {
            // It is only in the way of other files, so an error is no reason to end here.
            let _ = remove_leftover(&entry.path());
        }
    }
}

fn remove_leftover(folder: &Path) -> io::Result<()> {
    let marker = File::options().append(true).open(folder.join(MARKER));
    let marker = match marker {
        // This removes only an empty one. A process that has just made it makes another.
        Err(error) if error.kind() == ErrorKind::NotFound => return fs::remove_dir(folder),
        marker => marker?,
    };
    let is_abandoned = match try_lock(&marker) {
        Ok(locked) => locked,
        Err(_) => is_old(&marker),
    };
    if !is_abandoned || !is_only_ours(folder) {
        return Ok(());
    }
    // Windows removes a file only after it was closed.
    let marker = (!cfg!(windows)).then_some(marker);
    remove_files(folder)?;
    drop(marker);
    Ok(())
}

/// Where there are no locks, a folder counts as abandoned after a day. A writer that is alive gets
/// an error, and replaces nothing.
fn is_old(marker: &File) -> bool {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let modified = marker.metadata().and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > DAY))
}

/// Locks a file until it is closed; false if another process has it.
#[cfg(any(unix, windows))]
fn try_lock(file: &File) -> io::Result<bool> {
    match fs4::FileExt::try_lock(file) {
        Ok(()) => Ok(true),
        Err(fs4::TryLockError::WouldBlock) => Ok(false),
        Err(fs4::TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(not(any(unix, windows)))]
fn try_lock(_: &File) -> io::Result<bool> {
    Err(ErrorKind::Unsupported.into())
}

/// A folder that a checkpoint is written to. It is removed when dropped, unless it got its name.
#[derive(Debug)]
pub(super) struct Unfinished {
    path: PathBuf,
    /// Locked.
    marker: Option<File>,
}

impl Unfinished {
    pub(super) fn create(dir: &Path) -> io::Result<Self> {
        const TRIES: usize = 100;
        for _ in 0..TRIES {
            let path = dir.join(unfinished_name());
            fs::create_dir(&path)?;
            let mut folder = Self { path, marker: None };
            if folder.claim()? {
                return Ok(folder);
            }
        }
        let text = format!("{TRIES} new folders were removed by another process");
        Err(io::Error::other(text))
    }

    /// Marks and locks the folder; false if another process took it for a leftover before that.
    fn claim(&mut self) -> io::Result<bool> {
        let marker = self.path.join(MARKER);
        let mut file = match File::create_new(&marker) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            file => file?,
        };
        let locked = try_lock(&file).unwrap_or(true);
        if !locked || !is_there(&marker) {
            return Ok(false);
        }
        file.write_all(MARKER_TEXT.as_bytes())?;
        file.sync_all()?;
        self.marker = Some(file);
        Ok(true)
    }

    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the folder its name. An error if something but an empty folder is there.
    pub(super) fn rename(&mut self, name: &Path) -> io::Result<()> {
        if cfg!(windows) {
            self.marker = None; // Windows renames no folder with an open file
        }
        fs::rename(&self.path, name)?;
        self.path.clear();
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        self.marker = None;
        // The error that led here matters more than one from here.
        let _ = remove_files(&self.path);
    }
}

/// Makes a new file, and brings it to the disk.
pub(super) fn create_file(
    path: &Path,
    write: &mut dyn FnMut(&mut BufWriter<File>) -> Checked<()>,
) -> Checked<()> {
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, File::create_new(path)?);
    write(&mut out)?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok(file.sync_all()?)
}
