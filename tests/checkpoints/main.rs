//! A resumed run ends with the same bits as an uninterrupted one, and malformed files are refused.
#![allow(clippy::unwrap_used)]

mod contents;
mod differences;
mod files;
mod headers;
mod hostile;
mod resume;
mod saves;
mod training;
mod writers;
