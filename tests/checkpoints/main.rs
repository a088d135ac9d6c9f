//! A resumed run ends with the bits of one that was not interrupted, and no file can do harm.
#![allow(clippy::unwrap_used)]

mod contents;
mod differences;
mod files;
mod headers;
mod hostile;
mod resume;
mod saves;
mod writers;
