//! Trains with and without gradient clipping; see `--help`.

use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::Result;
use clap::Parser;
use oscillating_loss::{cli, interrupt};

fn main() -> ExitCode {
    one_thread_a_run();
    let args = cli::Cli::parse();
    match run(&args) {
        Ok(false) => ExitCode::SUCCESS,
        Ok(true) => ExitCode::from(interrupt::exit_status()),
        // Causes on one line, and no stack of calls even where RUST_BACKTRACE is set.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether it was interrupted.
fn run(args: &cli::Cli) -> Result<bool> {
    let interrupted = interrupt::watch()?;
    cli::run(args, &interrupted)?;
    Ok(interrupted.load(Ordering::Relaxed))
}

/// Keeps candle from splitting one run's small products over all cores: the runs share these.
///
/// candle asks for this variable at every product, and without it counts the cores anew each time,
/// in `/proc/cpuinfo`, which alone takes longer than a step of this model.
#[expect(
    unsafe_code,
    reason = "candle has no other way to choose the number of threads"
)]
fn one_thread_a_run() {
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        // SAFETY: the first statement of `main`: no other thread is there to read the environment.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    }
}
