//! Several runs at once, each on one thread.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use anyhow::{Result, anyhow};
use candle_core::Device;

use crate::data::Weather;
use crate::run::{Run, Step};
use crate::settings::Settings;
use crate::train::train;

/// Looks on while several runs go; `at` is the run's place in the list. Called from many threads.
pub trait Watch: Sync {
    /// A step was done.
    ///
    /// # Errors
    /// Ends all runs.
    fn step(&self, at: usize, step: &Step) -> Result<()>;

    /// A run is over.
    ///
    /// # Errors
    /// Ends all runs.
    fn end(&self, at: usize, run: &Run) -> Result<()>;
}

/// Trains with each of the settings, as many at a time as there are cores (one at a time on a GPU),
/// and returns the runs in their order.
///
/// After an interrupt, runs that had begun are returned as far as they got, and the others not at
/// all.
///
/// # Errors
/// The first error of any run; no other run is begun then.
pub fn train_all(
    settings: &[Settings],
    weather: &Weather,
    interrupt: &AtomicBool,
    watch: &impl Watch,
) -> Result<Vec<Run>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let worker = || -> Result<Vec<(usize, Run)>> {
        let mut runs = Vec::new();
        while !interrupt.load(Ordering::Relaxed) && !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(settings) = settings.get(at) else {
                break;
            };
            let run = train(settings, weather, interrupt, |step, _| watch.step(at, step))
                .and_then(|run| watch.end(at, &run).map(|()| run))
                .inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            runs.push((at, run));
        }
        Ok(runs)
    };
    let parts: Vec<Result<Vec<(usize, Run)>>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads(weather)).map(|_| scope.spawn(worker)).collect();
        let join = |worker: thread::ScopedJoinHandle<_>| {
            worker
                .join()
                .unwrap_or_else(|_| Err(anyhow!("a training thread panicked")))
        };
        workers.into_iter().map(join).collect()
    });
    let mut runs = Vec::new();
    for part in parts {
        runs.extend(part?);
    }
    runs.sort_by_key(|(at, _)| *at);
    Ok(runs.into_iter().map(|(_, run)| run).collect())
}

fn threads(weather: &Weather) -> usize {
    match weather.train.x.device() {
        Device::Cpu => thread::available_parallelism().map_or(1, NonZero::get),
        _ => 1,
    }
}
