//! The errors of saving and loading.

use std::io;
use std::path::Path;

use crate::error::Error;

/// The result of a part of saving or loading.
pub(super) type Checked<T> = std::result::Result<T, Fault>;

/// An error without the path of its file.
#[derive(Debug)]
pub(super) enum Fault {
    Io(io::Error),
    /// The file is in place, but its folder could not be synced to the disk.
    NotDurable(io::Error),
    /// The file, or the state to save, is invalid.
    Invalid(String),
    /// The file fits another optimizer.
    Different(Vec<String>),
    /// An error of a device.
    Other(Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Fault {
    /// The error for the file at `path`.
    pub(super) fn at(self, path: &Path) -> Error {
        let path = path.to_path_buf();
        match self {
            Self::Io(source) => Error::CheckpointIo { path, source },
            Self::NotDurable(source) => Error::CheckpointNotDurable { path, source },
            Self::Invalid(reason) => Error::Checkpoint { path, reason },
            Self::Different(differences) => Error::CheckpointMismatch { path, differences },
            Self::Other(error) => error,
        }
    }
}

/// Names for an error: ten of them, and how many more.
pub(super) fn join_names(names: &[String]) -> String {
    const SHOWN: usize = 10;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
