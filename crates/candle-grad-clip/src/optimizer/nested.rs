//! Detects a wrapper anywhere inside a wrapper's inner optimizer.
//!
//! Types can't show this, since a user's optimizer may be between the two. So the inner wrapper
//! reports its step to the outer one, through a thread-local.

use std::cell::Cell;

use crate::skip_reason::SkipReason;

thread_local! {
    /// The steps of inner wrappers, while an inner optimizer steps.
    static INSIDE: Cell<Option<Steps>> = const { Cell::new(None) };
}

#[derive(Debug, Clone, Copy, Default)]
struct Steps {
    taken: bool,
    /// The reason of the last skip.
    skipped: Option<SkipReason>,
}

/// Whether a wrapper's step is in progress on this thread.
pub(super) fn is_inside() -> bool {
    INSIDE.get().is_some()
}

/// Reports the result of a step to the outer wrapper, if there is one.
pub(super) fn tell(skipped: Option<SkipReason>) {
    if let Some(mut steps) = INSIDE.get() {
        steps.taken |= skipped.is_none();
        steps.skipped = skipped.or(steps.skipped);
        INSIDE.set(Some(steps));
    }
}

/// Runs the inner optimizer's step. Returns the reason if inner wrappers skipped it and none took
/// it.
pub(super) fn step(
    step: impl FnOnce() -> candle_core::Result<()>,
) -> candle_core::Result<Option<SkipReason>> {
    let outer = Restore(INSIDE.replace(Some(Steps::default())));
    step()?;
    let steps = INSIDE.get().unwrap_or_default();
    drop(outer);
    Ok(steps.skipped.filter(|_| !steps.taken))
}

/// Restores the previous value, also if a step panics.
struct Restore(Option<Steps>);

impl Drop for Restore {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}
