//! Trains with and without gradient clipping; see `--help`.

use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::Result;
use clap::Parser;
use oscillating_loss::{cli, interrupt};

fn main() -> Result<ExitCode> {
    one_thread_a_run();
    let args = cli::Cli::parse();
    let interrupted = interrupt::watch()?;
    cli::run(&args, &interrupted)?;
    let interrupted = interrupted.load(Ordering::Relaxed);
    Ok(if interrupted {
        ExitCode::from(interrupt::EXIT_STATUS)
    } else {
        ExitCode::SUCCESS
    })
}

/// Keeps candle from splitting one run's small products over all cores: the runs share these.
///
/// candle asks for this variable at every product, and without it counts the cores anew each time, in
/// `/proc/cpuinfo`, which alone takes longer than a step of this model.
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
