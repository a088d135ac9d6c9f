//! Self-contained HTML pages of charts, tables and text, which open offline.
//!
//! A [`Page`] is a list of [`Section`]s. [`Page::to_html`] puts them as JSON into a template, with
//! the chart library in the same file. [`Curve`] holds a series of any length in bounded memory.

mod compact;
mod curve;
mod html;
mod section;

pub use curve::Curve;
pub(crate) use section::spans_decades;
pub use section::{HeatMap, Line, LineChart, Mark, Page, Panel, Refresh, Section, Table};
