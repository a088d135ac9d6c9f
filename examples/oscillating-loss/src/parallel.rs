//! Several runs at once, each on one thread.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use anyhow::{Result, anyhow};
use candle_core::Device;

/// Calls `run` with each number below `count`, as many at a time as there are cores (one at a time
/// on a GPU), and returns the results in their order.
///
/// After an interrupt no call is begun any more.
///
/// # Errors
/// The first error of any call; no other call is begun then.
pub fn for_each<T: Send>(
    count: usize,
    device: &Device,
    interrupt: &AtomicBool,
    run: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let worker = || -> Result<Vec<(usize, T)>> {
        let mut results = Vec::new();
        while !interrupt.load(Ordering::Relaxed) && !failed.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                break;
            }
            let result = run(at).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            results.push((at, result));
        }
        Ok(results)
    };
    let parts: Vec<Result<Vec<(usize, T)>>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads(device)).map(|_| scope.spawn(worker)).collect();
        let join = |worker: thread::ScopedJoinHandle<_>| {
            worker
                .join()
                .unwrap_or_else(|_| Err(anyhow!("a training thread panicked")))
        };
        workers.into_iter().map(join).collect()
    });
    let mut results = Vec::new();
    for part in parts {
        results.extend(part?);
    }
    results.sort_by_key(|(at, _)| *at);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

fn threads(device: &Device) -> usize {
    match device {
        Device::Cpu => thread::available_parallelism().map_or(1, NonZero::get),
        _ => 1,
    }
}
