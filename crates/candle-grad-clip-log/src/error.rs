//! What can go wrong, with the name of the file.

use std::io;
use std::path::{Path, PathBuf};

/// The error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder can't be read or written.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried, for example "write".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A new run would overwrite this file of an earlier one.
    #[error(
        "`{}` is there already: choose another folder, go on with RunLog::resume, or replace an \
         earlier run with RunLog::overwrite",
        path.display()
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file has the name of one of ours, but other contents.
    #[error("`{}` was not written by candle-grad-clip-log, or is damaged: {what}", path.display())]
    NotOurs {
        /// The file. It is left as it is.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A step comes after one of the same or a higher number, under `strict`.
    #[error(
        "step {step} comes after step {last}: expected rising numbers, one RunLog for each \
         optimizer, and RunLog::resume with the step of the checkpoint"
    )]
    StepNotRising {
        /// The number of the step.
        step: u64,
        /// The one before.
        last: u64,
    },
    /// A step that the format of event files can't hold.
    #[error("step {0} is too large for an event file: expected at most i64::MAX")]
    StepTooLarge(u64),
    /// What was given to `config` can't be written as JSON.
    #[error("the config cannot be written as JSON: {0}")]
    Config(serde_json::Error),
    /// The numbers of a step can't be read from a GPU.
    #[error(transparent)]
    Report(#[from] candle_grad_clip::Error),
    /// A tensor can't be read from its device.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// The message with its cause, for a warning.
    pub(crate) fn with_cause(&self) -> String {
        std::error::Error::source(self)
            .map_or_else(|| self.to_string(), |cause| format!("{self}: {cause}"))
    }
}
