//! Ctrl-C: the first asks all runs to end and write what they have, the second ends the program.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// The exit status of a program that Ctrl-C ended.
pub const EXIT_STATUS: u8 = 130;

/// Watches for Ctrl-C; the flag becomes true with the first.
///
/// # Errors
/// If the system refuses a handler.
pub fn watch() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            process::exit(i32::from(EXIT_STATUS));
        }
        eprintln!("\nFinishing the step at hand and writing all files; Ctrl-C again to drop them.");
    })
    .context("can't watch for Ctrl-C")?;
    Ok(interrupted)
}
