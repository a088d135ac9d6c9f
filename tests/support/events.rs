//! Collects tracing events.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Once;

use anyhow::Result;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// One event: its level, and its fields as text.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its level.
    pub level: Level,
    /// Its fields.
    pub fields: Fields,
}

/// Fields by name, as text.
#[derive(Debug, Clone, Default)]
pub struct Fields(pub BTreeMap<String, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().into(), format!("{value:?}"));
    }
}

thread_local! {
    /// The events of this thread, if they are collected.
    static SEEN: RefCell<Option<Vec<Seen>>> = const { RefCell::new(None) };
}

struct Collector;

impl<S: Subscriber> Layer<S> for Collector {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = *event.metadata().level();
        SEEN.with_borrow_mut(|seen| {
            if let Some(seen) = seen {
                seen.push(Seen { level, fields });
            }
        });
    }
}

/// The events of `f` in this thread.
///
/// # Errors
/// Those of `f`.
///
/// # Panics
/// If there is another subscriber for all threads.
pub fn events(f: impl FnOnce() -> Result<()>) -> Result<Vec<Seen>> {
    // One for all threads: beside a subscriber of one thread, an event that comes up in another
    // thread first may be switched off for all.
    static COLLECTOR: Once = Once::new();
    COLLECTOR.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(Collector);
        let is_only_one = tracing::subscriber::set_global_default(subscriber);
        assert!(is_only_one.is_ok());
    });
    SEEN.replace(Some(Vec::new()));
    let result = f();
    let seen = SEEN.take().unwrap_or_default();
    result.map(|()| seen)
}

/// The fields of the events of a level.
#[must_use]
pub fn of_level(events: &[Seen], level: Level) -> Vec<&Fields> {
    let of = events.iter().filter(|event| event.level == level);
    of.map(|event| &event.fields).collect()
}
