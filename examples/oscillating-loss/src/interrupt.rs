//! Ctrl-C, and the SIGTERM with which schedulers end a job: the first asks all runs to end and
//! write what they have. After that Ctrl-C ends the program; another SIGTERM does not, as `timeout`
//! and others send it twice.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use anyhow::{Context, Result};

/// SIGINT.
const CTRL_C: u8 = 2;

/// The signal that ended the runs.
static SIGNAL: AtomicU8 = AtomicU8::new(CTRL_C);

/// The exit status of a program that a signal ended: 128 and the signal, 130 for Ctrl-C, 143 for
/// SIGTERM.
#[must_use]
pub fn exit_status() -> u8 {
    128 + SIGNAL.load(Ordering::Relaxed)
}

/// Watches for Ctrl-C and SIGTERM; the flag becomes true with the first.
///
/// # Errors
/// If the system refuses a handler.
pub fn watch() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    let on_signal = move |signal| {
        SIGNAL.store(signal, Ordering::Relaxed);
        if !flag.swap(true, Ordering::Relaxed) {
            eprintln!("\nFinishing the step at hand and writing all files; Ctrl-C to drop them.");
        } else if signal == CTRL_C {
            process::exit(i32::from(exit_status()));
        }
    };
    listen(on_signal).context("can't watch for Ctrl-C")?;
    Ok(interrupted)
}

#[cfg(unix)]
fn listen(on_signal: impl Fn(u8) + Send + 'static) -> Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let each = move || {
        for signal in signals.forever() {
            on_signal(u8::try_from(signal).unwrap_or(CTRL_C));
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(each)?;
    Ok(())
}

#[cfg(not(unix))]
fn listen(on_signal: impl Fn(u8) + Send + 'static) -> Result<()> {
    Ok(ctrlc::set_handler(move || on_signal(CTRL_C))?)
}
