//! The threads that work on CPU tensors.
//!
//! candle's `matmul` holds the locks of its tensors while it waits for rayon's global pool. So a thread of that pool must
//! never wait for the lock of a tensor: the two would wait for each other. Our threads do wait for locks, therefore:
//!
//! - They are pools of our own, and nobody else's work runs on them.
//! - One call at a time has a pool. A thread that waits for parts of its work, with a lock in its hand, can then pick up
//!   nothing but such parts, which take no lock.
//! - The caller waits asleep. A worker of another pool would take up other work meanwhile, with whatever lock it holds.

use std::cell::Cell;
use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::Work;
use crate::Result;

/// Pools that nobody uses now. As many are made as there were calls at one time.
static IDLE: Mutex<Vec<ThreadPool>> = Mutex::new(Vec::new());

thread_local! {
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f(parallel)`: large work inside a pool of our own, so that its parts start and end cheaply; small work right
/// here, since waking a thread costs more than it.
///
/// # Errors
/// The system gives no more threads; `f` has not run then.
pub(crate) fn run<R: Send>(work: Work, f: impl FnOnce(bool) -> Result<R> + Send) -> Result<R> {
    if work == Work::Small {
        return f(false);
    }
    if IS_OURS.get() {
        return f(true); // a part of a call that has a pool already
    }
    let lease = Lease::take()?;
    let run = || lease.install(|| f(true));
    if rayon::current_thread_index().is_none() {
        return run();
    }
    // From a worker of the user's, `install` would take up the user's other tasks while it waits.
    std::thread::scope(|scope| {
        let driver = std::thread::Builder::new().spawn_scoped(scope, run);
        let driver = driver.map_err(candle_core::Error::wrap)?;
        driver.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Whether slices of more than one block may be worked on here: the kernels use the pool of the thread that calls them.
pub(crate) fn may_be_parallel() -> bool {
    IS_OURS.get()
}

/// A pool for one call.
struct Lease(Option<ThreadPool>);

impl Lease {
    /// With as many threads as the caller's pool: of `RAYON_NUM_THREADS`, or of a pool that the caller runs in.
    fn take() -> Result<Self> {
        let num_threads = rayon::current_num_threads();
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |pool: &ThreadPool| pool.current_num_threads() == num_threads;
        if let Some(index) = idle.iter().position(fits) {
            return Ok(Self(Some(idle.swap_remove(index))));
        }
        drop(idle);
        let pool = ThreadPoolBuilder::new()
            .num_threads(num_threads)
            .thread_name(|index| format!("grad-clip-{index}"))
            .start_handler(|_| IS_OURS.set(true))
            .build();
        Ok(Self(Some(pool.map_err(candle_core::Error::wrap)?)))
    }

    fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match &self.0 {
            Some(pool) => pool.install(f),
            None => f(),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        idle.extend(self.0.take());
    }
}
