//! What concerns the whole process: threads, its pool, its log, its end.
//!
//! A test that needs a process of its own starts this binary again with the name of one test.
#![allow(clippy::unwrap_used)]

mod determinism;
mod poison;
mod soak;
mod threads;
mod tracing_events;
mod watchdog;
