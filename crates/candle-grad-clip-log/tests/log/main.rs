//! Logs of made-up runs: what is in the files, after a kill too.
#![allow(clippy::unwrap_used)]

mod contents;
mod folders;
mod kill;
mod made_up;
mod page;
mod resume;
mod size;
