//! Collects tracing events.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

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

#[derive(Debug, Clone, Default)]
struct Collector(Arc<Mutex<Vec<Seen>>>);

impl<S: Subscriber> Layer<S> for Collector {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = *event.metadata().level();
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Seen { level, fields });
    }
}

/// The events of `f`.
///
/// # Errors
/// Those of `f`.
pub fn events(f: impl FnOnce() -> Result<()>) -> Result<Vec<Seen>> {
    let collector = Collector::default();
    let subscriber = tracing_subscriber::registry().with(collector.clone());
    tracing::subscriber::with_default(subscriber, f)?;
    let seen = collector
        .0
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    Ok(seen)
}

/// The fields of the events of a level.
#[must_use]
pub fn of_level(events: &[Seen], level: Level) -> Vec<&Fields> {
    let of = events.iter().filter(|event| event.level == level);
    of.map(|event| &event.fields).collect()
}
