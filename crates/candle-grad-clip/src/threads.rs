//! The thread pools for work on CPU tensors.
//!
//! candle's `matmul` holds the locks of its tensors while it waits for rayon's global pool. If a
//! thread of that pool waited for the lock of a tensor, the two would deadlock. This crate's
//! threads do wait for such locks, so these rules apply:
//!
//! - The pools are private: they run no work of other code.
//! - A pool serves one call at a time. A thread that waits inside the pool while it holds a lock
//!   can steal only parts of the same call, and those take no lock.
//! - The caller sleeps while it waits. A worker of another rayon pool would steal other work while
//!   it holds a lock.

use std::cell::Cell;
use std::panic::resume_unwind;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use candle_core::Var;
use candle_grad_clip_kernels::BLOCK;

use crate::error::Result;

/// Unused pools. Their number is the highest number of concurrent calls so far.
static IDLE: Mutex<Vec<ThreadPool>> = Mutex::new(Vec::new());

thread_local! {
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}

/// More Vars than this are worth several threads, however small they are.
pub(crate) const MANY_VARS: usize = 512;

/// Whether the work is worth several threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Small,
    Large,
}

impl Work {
    /// The work of visiting the gradients of `vars`.
    pub(crate) fn of(vars: &[Var]) -> Self {
        if vars.len() > MANY_VARS {
            return Self::Large;
        }
        Self::of_elements(vars.iter().map(|var| var.elem_count()).sum())
    }

    pub(crate) fn of_elements(elements: usize) -> Self {
        if elements > BLOCK {
            Self::Large
        } else {
            Self::Small
        }
    }
}

/// Calls `f` for each task. Large work runs on the caller's thread and on a private pool. Small
/// work runs on the caller's thread only, since waking a thread costs more. Each tensor of a task
/// has at most one block.
///
/// # Errors
/// That of the first task that failed. Of large work, all other tasks have run; small work stops
/// there. If the system can't create threads, no task has run.
pub(crate) fn for_each<T: Send>(
    work: Work,
    mut tasks: impl Iterator<Item = T> + Send,
    f: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    if work == Work::Small || IS_OURS.get() {
        return tasks.try_for_each(f);
    }
    let tasks = Mutex::new(tasks.enumerate());
    let first_error = Mutex::new(None);
    let work_through = || {
        loop {
            let next = lock(&tasks).next();
            let Some((index, task)) = next else { break };
            if let Err(error) = f(task) {
                let mut first = lock(&first_error);
                if first.as_ref().is_none_or(|(other, _)| index < *other) {
                    *first = Some((index, error));
                }
            }
        }
    };
    with_pool(|pool| {
        away_from_other_pools(|| {
            pool.in_place_scope(|scope| {
                for _ in 1..pool.current_num_threads() {
                    scope.spawn(|_| work_through());
                }
                work_through();
            });
        })
    })?;
    let first_error = first_error.into_inner();
    match first_error.unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Calls `f` for each large item, one after the other inside a private pool, since each item is
/// parallel inside. Small work has no large items.
///
/// # Errors
/// That of `f`, or the system can't create threads.
pub(crate) fn for_each_large<T: Send>(
    work: Work,
    items: impl Iterator<Item = T> + Send,
    f: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    let mut items = items.peekable();
    if work == Work::Small || items.peek().is_none() {
        return Ok(());
    }
    run(work, || items.try_for_each(&f))
}

/// Runs `f`. Large work runs inside a private pool, where slices of more than one block are
/// processed in parallel.
///
/// # Errors
/// That of `f`. If the system can't create threads, `f` has not run.
pub(crate) fn run<R: Send>(work: Work, f: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    if work == Work::Small || IS_OURS.get() {
        return f(); // a private pool's thread already has its pool
    }
    with_pool(|pool| away_from_other_pools(|| pool.install(f))?)
}

/// Runs `f`. If the caller is a worker of another rayon pool, `f` runs on a separate thread: that
/// worker could steal other tasks while it waits, or wait for a lock.
fn away_from_other_pools<R: Send>(f: impl FnOnce() -> R + Send) -> Result<R> {
    if rayon::current_thread_index().is_none() {
        return Ok(f());
    }
    std::thread::scope(|scope| {
        let driver = std::thread::Builder::new().spawn_scoped(scope, f);
        let driver = driver.map_err(candle_core::Error::wrap)?;
        Ok(driver.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether slices of more than one block may be processed here: the kernels use the pool of the
/// calling thread.
#[inline]
pub(crate) fn may_be_parallel() -> bool {
    IS_OURS.get()
}

/// Calls `f` with a pool that no other call uses meanwhile. If `f` panics, the pool is dropped.
fn with_pool<R>(f: impl FnOnce(&ThreadPool) -> Result<R>) -> Result<R> {
    let pool = take()?;
    let result = f(&pool);
    lock(&IDLE).push(pool);
    result
}

/// A pool with as many threads as the caller's pool, or as `RAYON_NUM_THREADS`.
fn take() -> Result<ThreadPool> {
    let num_threads = rayon::current_num_threads();
    let mut idle = lock(&IDLE);
    let fits = |pool: &ThreadPool| pool.current_num_threads() == num_threads;
    if let Some(index) = idle.iter().position(fits) {
        return Ok(idle.swap_remove(index));
    }
    drop(idle);
    let pool = ThreadPoolBuilder::new()
        .num_threads(num_threads)
        .thread_name(|index| format!("grad-clip-{index}"))
        .start_handler(|_| IS_OURS.set(true))
        .build();
    Ok(pool.map_err(candle_core::Error::wrap)?)
}
