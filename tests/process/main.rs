//! Properties of the whole process: threads and their number, determinism, tracing events, and the
//! soak test.
//!
//! A test that needs a separate process starts this binary again with the test's name.
#![allow(clippy::unwrap_used)]

mod determinism;
mod poison;
mod soak;
mod threads;
mod tracing_events;
mod watchdog;
