//! What the commands leave behind, and how runs go on.
#![allow(clippy::unwrap_used)]

mod arguments;
mod interruptions;
mod outcome;
mod outputs;
mod resume;
mod study;
mod study_table;
