//! The threads that work on CPU tensors.
//!
//! candle's `matmul` holds the locks of its tensors while it waits for rayon's global pool. So a
//! thread of that pool must never wait for the lock of a tensor: the two would wait for each other.
//! Our threads do wait for locks, therefore:
//!
//! - They are pools of our own, and nobody else's work runs on them.
//! - One call at a time has a pool. A thread that waits for parts of its work, with a lock in its
//!   hand, can then pick up nothing but such parts, which take no lock.
//! - The caller waits asleep. A worker of another pool would take up other work meanwhile, with
//!   whatever lock it holds.

use std::cell::Cell;
use std::panic::resume_unwind;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use candle_core::Var;
use candle_grad_clip_kernels::BLOCK;

use crate::error::Result;

/// Pools that nobody uses now. As many are made as there were calls at one time.
static IDLE: Mutex<Vec<ThreadPool>> = Mutex::new(Vec::new());

thread_local! {
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}

/// More Vars than this are worth more than one thread, however small they are.
pub(crate) const MANY_VARS: usize = 512;

/// Whether work is worth more than one thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Small,
    Large,
}

impl Work {
    /// The work of walking over some Vars' gradients.
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

/// Calls `f` for each task: large work on the caller's thread and on threads of ours at once, small
/// work right here, since waking a thread costs more than it. A task works on tensors of one block
/// each.
///
/// The caller takes part, so that one thread fewer has to wake.
///
/// # Errors
/// That of the first task that failed; the others have run. The system gives no more threads; none
/// has run then.
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

/// Calls `f` for each large item, one by one inside a pool of ours, as each is worked on in
/// parallel. Small work has none.
///
/// # Errors
/// Those of `f`; the system gives no more threads.
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

/// Runs `f`: for large work inside a pool of ours, where slices of more than one block may be
/// worked on in parallel.
///
/// # Errors
/// The system gives no more threads; `f` has not run then.
pub(crate) fn run<R: Send>(work: Work, f: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    if work == Work::Small || IS_OURS.get() {
        return f(); // if ours, it is a part of a call that has a pool already
    }
    with_pool(|pool| away_from_other_pools(|| pool.install(f))?)
}

/// Runs `f`, on a thread of its own if the caller is a worker of the user's: it would take up the
/// user's other tasks while it waits, or wait for a lock.
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

/// Whether slices of more than one block may be worked on here: the kernels use the pool of the
/// thread that calls them.
pub(crate) fn may_be_parallel() -> bool {
    IS_OURS.get()
}

/// Calls `f` with a pool that nobody else uses meanwhile. If `f` panics the pool ends.
fn with_pool<R>(f: impl FnOnce(&ThreadPool) -> Result<R>) -> Result<R> {
    let pool = take()?;
    let result = f(&pool);
    lock(&IDLE).push(pool);
    result
}

/// A pool with as many threads as the caller's: of `RAYON_NUM_THREADS`, or of a pool that the
/// caller runs in.
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
