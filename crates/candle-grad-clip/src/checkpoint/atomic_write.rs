//! Replaces a file atomically.

use std::collections::hash_map::RandomState;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, BufWriter, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::fault::{Checked, Fault};
use super::file::BUFFER_BYTES;

/// Writes a temporary file beside `path`, syncs it to the disk and renames it. At any time, even
/// after a power cut, there is the complete old file or the complete new one. A symbolic link
/// stays, and its target is replaced. Of several writers, in any processes or machines, the last
/// one wins with a complete file.
pub(super) fn replace(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Checked<()>,
) -> Checked<()> {
    replace_by(path, &mut random_name, write)
}

/// Like [`replace`], with temporary names from `name`.
fn replace_by(
    path: &Path,
    name: &mut dyn FnMut() -> String,
    write: impl FnOnce(&mut BufWriter<File>) -> Checked<()>,
) -> Checked<()> {
    let path = &behind_links(path)?;
    let Some(file_name) = path.file_name() else {
        return Err(Fault::Invalid("not the name of a file".to_string()));
    };
    let old = fs::metadata(path).ok();
    // For example a device, which the rename would replace by a file.
    if old.as_ref().is_some_and(|metadata| !metadata.is_file()) {
        return Err(Fault::Invalid(
            "something that is not a file is there, and stays; expected a file, or nothing"
                .to_string(),
        ));
    }
    let folder = folder_of(path);
    let prefix = prefix(&file_name.to_string_lossy());
    let (temporary, file) = Temporary::create(folder, &prefix, name, old.is_some())?;
    remove_leftovers(folder, &prefix, &file);
    if let Some(old) = old.filter(|_| cfg!(unix)) {
        // If this fails, the file system has no modes.
        let _ = file.set_permissions(old.permissions());
    }
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
    write(&mut out)?;
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_all()?;
    drop(file); // some systems cannot rename an open file
    fs::rename(&temporary.path, path)?;
    sync_folder(folder).map_err(Fault::NotDurable)
}

/// `path` with its symbolic links followed, also dangling ones.
fn behind_links(path: &Path) -> Checked<PathBuf> {
    const MOST_LINKS: usize = 40; // like Linux
    let mut path = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        if !fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink()) {
            return Ok(path);
        }
        path = folder_of(&path).join(fs::read_link(&path)?);
    }
    Err(Fault::Invalid(format!(
        "more than {MOST_LINKS} symbolic links follow one another, expected a file at their end"
    )))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Removes its file when dropped, if it still has its name.
struct Temporary {
    path: PathBuf,
}

/// The suffix of our temporary files.
const SUFFIX: &str = ".tmp";

/// The prefix of the temporary names for one file. Short, since the file's own name may have the
/// maximal length.
fn prefix(file_name: &str) -> String {
    const MOST_BYTES: usize = 60;
    let fits = |end: &usize| file_name.is_char_boundary(*end);
    let end = (0..=MOST_BYTES.min(file_name.len())).rev().find(fits);
    format!(".{}.", &file_name[..end.unwrap_or(0)])
}

/// A name that no other writer uses: 128 bits, hashed with the system's random keys. A process id
/// is not enough, as it may be the same in several containers.
pub(super) fn random_name() -> String {
    let number = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", number(), number())
}

impl Temporary {
    /// Creates a new file, never one that another writer has open.
    fn create(
        folder: &Path,
        prefix: &str,
        name: &mut dyn FnMut() -> String,
        is_private: bool,
    ) -> io::Result<(Self, File)> {
        const TRIES: usize = 100;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        if is_private {
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600); // until it gets the old file's mode
        }
        let mut tries = 0;
        loop {
            let path = folder.join(format!("{prefix}{}{SUFFIX}", name()));
            match options.open(&path) {
                Ok(file) => return Ok((Self { path }, file)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists && tries < TRIES => {
                    tries += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // The error that led here matters more than one from here.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the temporary files of earlier, killed saves to the same path, since each is as large as
/// the state. Nobody can tell whether a writer in another container or machine is alive. So a file
/// that was not written to for a day counts as abandoned. (A writer that sleeps for so long gets an
/// error, and replaces no other writer's file.)
fn remove_leftovers(folder: &Path, prefix: &str, ours: &File) {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    // By the clock of the file system, which may be another machine's.
    let Ok(now) = ours.metadata().and_then(|metadata| metadata.modified()) else {
        return;
    };
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !name.to_str().is_some_and(|name| is_temporary(name, prefix)) {
            continue;
        }
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let age = modified.map(|modified| now.duration_since(modified));
        if matches!(age, Ok(Ok(age)) if age > DAY) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn is_temporary(name: &str, prefix: &str) -> bool {
    let middle = name.strip_prefix(prefix);
    let middle = middle.and_then(|rest| rest.strip_suffix(SUFFIX));
    middle.is_some_and(|middle| {
        middle.len() == 32 && middle.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

/// Makes the rename durable. Windows has no such call, and some file systems refuse it.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A folder of this test, removed when dropped.
    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> io::Result<Self> {
            let path = std::env::temp_dir().join(format!(
                "candle-grad-clip-replace-{test}-{}",
                std::process::id()
            ));
            fs::create_dir_all(&path)?;
            Ok(Self(path))
        }

        fn names(&self) -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(&self.0)? {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
            names.sort();
            Ok(names)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// Two writers that choose the same temporary name.
    #[test]
    fn equal_names_take_nobodys_file() -> anyhow::Result<()> {
        let folder = Folder::new("equal")?;
        let path = folder.0.join("o");
        let names = || {
            let mut names = ["same", "same", "other"].map(String::from).into_iter();
            move || names.next().unwrap_or_default()
        };
        let fault = |fault: Fault| anyhow::anyhow!("{fault:?}");
        replace_by(&path, &mut names(), |out| {
            out.write_all(b"the first")?;
            out.flush()?;
            replace_by(&path, &mut names(), |out| Ok(out.write_all(b"another")?))?;
            assert_eq!(fs::read(&path)?, b"another");
            assert_eq!(
                fs::read(folder.0.join(".o.same.tmp"))?,
                b"the first",
                "the file of the writer that is not ready"
            );
            Ok(out.write_all(b", whole")?)
        })
        .map_err(fault)?;
        assert_eq!(fs::read(&path)?, b"the first, whole");
        assert_eq!(folder.names()?, ["o"]);

        // If all names are taken: an error, and the other writer's file stays.
        fs::write(folder.0.join(".o.same.tmp"), "theirs")?;
        let mut same = || "same".to_string();
        let result = replace_by(&path, &mut same, |_| Ok(()));
        assert!(
            matches!(result, Err(Fault::Io(error)) if error.kind() == ErrorKind::AlreadyExists)
        );
        assert_eq!(fs::read(folder.0.join(".o.same.tmp"))?, b"theirs");
        assert_eq!(fs::read(&path)?, b"the first, whole");
        Ok(())
    }

    #[test]
    fn names_differ() {
        let mut seen = std::collections::HashSet::new();
        for _ in 0..10_000 {
            let name = random_name();
            assert!(is_temporary(&format!(".o.{name}.tmp"), &prefix("o")));
            assert!(seen.insert(name));
        }
        assert_eq!(prefix("o"), ".o.");
        assert_eq!(prefix(&"é".repeat(100)), format!(".{}.", "é".repeat(30)));
        assert_eq!(prefix(&format!("x{}", "é".repeat(100))).len(), 61); // 59 of its bytes
    }
}
