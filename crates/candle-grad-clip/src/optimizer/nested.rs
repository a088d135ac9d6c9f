//! A wrapper whose inner optimizer has a wrapper in it, anywhere.
//!
//! Types don't tell it (there may be an optimizer of the user's between them), so the inner one
//! tells the outer one while it steps: on the same thread.

use std::cell::Cell;

use crate::skip_reason::SkipReason;

thread_local! {
    /// What the wrappers inside have done, while the inner optimizer of one steps.
    static INSIDE: Cell<Option<Steps>> = const { Cell::new(None) };
}

#[derive(Debug, Clone, Copy, Default)]
struct Steps {
    taken: bool,
    /// The reason of the last.
    skipped: Option<SkipReason>,
}

/// Whether a wrapper takes a step with the caller in it.
pub(super) fn is_inside() -> bool {
    INSIDE.get().is_some()
}

/// Tells the wrapper around this one, if there is one, what came of the step.
pub(super) fn tell(skipped: Option<SkipReason>) {
    if let Some(mut steps) = INSIDE.get() {
        steps.taken |= skipped.is_none();
        steps.skipped = skipped.or(steps.skipped);
        INSIDE.set(Some(steps));
    }
}

/// Takes the inner optimizer's step. Returns why, if wrappers in it skipped it and none took it.
pub(super) fn step(
    step: impl FnOnce() -> candle_core::Result<()>,
) -> candle_core::Result<Option<SkipReason>> {
    let outer = Restore(INSIDE.replace(Some(Steps::default())));
    step()?;
    let steps = INSIDE.get().unwrap_or_default();
    drop(outer);
    Ok(steps.skipped.filter(|_| !steps.taken))
}

/// Puts back what was there, also when a step panics.
struct Restore(Option<Steps>);

impl Drop for Restore {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}
