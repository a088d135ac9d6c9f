//! The parts of a page, as plain data.
//!
//! They serialize into what the page's script reads: numbers to six digits, NaN and infinities as
//! text.

use serde::Serialize;

use super::compact;

/// One page.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Page {
    /// The title of the document and its first heading.
    pub title: String,
    /// A line below the title, for example the state of the run.
    pub subtitle: String,
    /// Set while a run goes on: the page reloads itself.
    pub refresh: Option<Refresh>,
    /// From top to bottom.
    pub sections: Vec<Section>,
}

/// How a page reloads itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Refresh {
    /// The time between two loads, in seconds.
    pub seconds: f64,
}

/// One part of a page.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Section {
    /// A heading. Sections up to the next heading belong to it.
    Heading {
        /// The text, for example "Is it learning?".
        text: String,
    },
    /// A paragraph of plain text.
    Text {
        /// The text. Line breaks are kept.
        text: String,
        /// How it is marked.
        mark: Mark,
    },
    /// Panels of lines.
    LineChart(LineChart),
    /// Rows of coloured cells.
    HeatMap(HeatMap),
    /// A table that a click on a column sorts.
    Table(Table),
    /// Links, one below the other.
    Links {
        /// The text and the relative address of each.
        links: Vec<(String, String)>,
    },
}

/// The meaning of a paragraph. Each mark has a sign beside its colour.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mark {
    /// Plain text.
    #[default]
    None,
    /// All is well.
    Good,
    /// Something to look at.
    Warning,
}

/// Panels one below the other. They share their x axis, the zoom and the legend: lines of one name
/// are shown and hidden together.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LineChart {
    /// The line at the top.
    pub title: String,
    /// What the x axis shows, with its unit.
    pub x_label: String,
    /// Whether x is logarithmic. Points at 0 and below are not drawn then.
    pub x_log: bool,
    /// What stands at x = 0, 1, 2, ... in place of numbers; empty for numbers.
    pub x_names: Vec<String>,
    /// From top to bottom.
    pub panels: Vec<Panel>,
}

/// One pair of axes.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Panel {
    /// A line above it, if it is not empty.
    pub title: String,
    /// What the y axis shows, with its unit.
    pub y_label: String,
    /// Whether y is logarithmic, until the reader switches. Values of 0 and below are not drawn
    /// then, and values more than 1,000 times outside the middle 80 % leave the panel, until the
    /// reader zooms in on them.
    pub y_log: bool,
    /// The lines.
    pub lines: Vec<Line>,
    /// Named levels: grey lines across the panel, such as a fixed limit.
    #[serde(serialize_with = "compact::levels")]
    pub levels: Vec<(String, f64)>,
}

/// One line.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Line {
    /// The text in the legend.
    pub name: String,
    /// (x, y) in the order of x. A y that is NaN or infinite makes a gap, and a cross at the edge
    /// of the panel marks it. An x that is not finite makes a gap without a cross.
    #[serde(serialize_with = "compact::points")]
    pub points: Vec<(f64, f64)>,
    /// Whether each point has a marker.
    pub markers: bool,
    /// Whether the line is dashed.
    pub dashed: bool,
    /// Whether it is thin and pale, as a single seed behind the line of the same name.
    pub faint: bool,
    /// Its colour, symbol and dash pattern in the palette; lines of one index look alike.
    pub style: usize,
}

/// Rows of cells, coloured by the logarithm of their value.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct HeatMap {
    /// The line at the top.
    pub title: String,
    /// What a column is, for example "step".
    pub x_label: String,
    /// What a cell shows, with its unit.
    pub value_label: String,
    /// The text of each column.
    pub columns: Vec<String>,
    /// Name and cells of each row. None is a cell without a value; 0, NaN and infinity have colours
    /// of their own. Values below 0 count as 0.
    #[serde(serialize_with = "compact::rows")]
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

/// A table.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Table {
    /// The line at the top.
    pub title: String,
    /// The heads of the columns.
    pub columns: Vec<String>,
    /// The cells, as they are shown. A column of numbers is sorted by value.
    pub rows: Vec<Vec<String>>,
}

/// Whether a logarithmic axis shows more: all values are above 0, the largest far above the
/// smallest.
pub(crate) fn spans_decades(lines: &[Line]) -> bool {
    let values = lines.iter().flat_map(|line| &line.points);
    let values = values
        .map(|point| point.1)
        .filter(|value| value.is_finite());
    let (low, high) = values.fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), value| {
        (low.min(value), high.max(value))
    });
    low > 0.0 && high > 20.0 * low
}
