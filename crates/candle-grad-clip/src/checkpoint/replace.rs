//! A file is replaced as a whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::file::BUFFER_BYTES;
use super::{Checked, Fault};

/// Writes beside `path`, and renames over it when all is on the disk: at each moment the old file is there, or the
/// new one, also after a power cut.
pub(super) fn replace(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Checked<()>,
) -> Checked<()> {
    let Some(file_name) = path.file_name() else {
        return Err(Fault::Invalid("not the name of a file".to_string()));
    };
    // Also a device: a rename would put a file in its place.
    if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(Fault::Invalid(
            "something that is not a file is there, and stays; expected a file, or nothing"
                .to_string(),
        ));
    }
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let prefix = format!(".{}.", file_name.to_string_lossy());
    remove_leftovers(folder, &prefix);
    let (temporary, file) = Temporary::create(folder, &prefix)?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
    write(&mut out)?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    drop(file); // some systems rename no open file
    fs::rename(&temporary.path, path)?;
    Ok(sync_folder(folder)?)
}

/// Removes its file when dropped, if it still has its name.
struct Temporary {
    path: PathBuf,
}

/// What the names of our temporary files end with.
const SUFFIX: &str = ".tmp";

impl Temporary {
    fn create(folder: &Path, prefix: &str) -> io::Result<(Self, File)> {
        static CREATED: AtomicU64 = AtomicU64::new(0);
        let number = CREATED.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("{prefix}{}-{number}{SUFFIX}", std::process::id()));
        // A process that was killed may have had our id, as the first in a container has.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)?;
        Ok((Self { path }, file))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // The error that led here says more than one from here would.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes what earlier saves to the same path left that were killed, since each is as large as the state. Only where it can be told
/// that the process is gone: on Linux.
fn remove_leftovers(folder: &Path, prefix: &str) {
    let processes = Path::new("/proc");
    if !processes.join("self").exists() {
        return;
    }
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(process) = name.to_str().and_then(|name| process_of(name, prefix)) else {
            continue;
        };
        if !processes.join(process.to_string()).exists() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The process that made a temporary file.
fn process_of(name: &str, prefix: &str) -> Option<u32> {
    let middle = name.strip_prefix(prefix)?.strip_suffix(SUFFIX)?;
    let (process, number) = middle.split_once('-')?;
    number.parse::<u64>().ok()?;
    process.parse().ok()
}

/// Makes the rename last. Windows has no such call, and some file systems refuse it.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    match File::open(folder)?.sync_all() {
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::InvalidInput | ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}
