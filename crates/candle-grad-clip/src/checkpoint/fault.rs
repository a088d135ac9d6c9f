//! What goes wrong with a checkpoint.

use std::io;
use std::path::Path;

use crate::error::Error;

/// What a part of saving or loading returns.
pub(super) type Checked<T> = std::result::Result<T, Fault>;

/// What went wrong, before it is known with which file.
#[derive(Debug)]
pub(super) enum Fault {
    Io(io::Error),
    /// The file is in place, but its folder can't be brought to the disk.
    NotDurable(io::Error),
    /// The file, or what is to be saved, is not as it must be.
    Invalid(String),
    /// The file fits another optimizer.
    Different(Vec<String>),
    /// A device.
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
    /// The error, of the file at `path`.
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
