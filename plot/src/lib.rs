//! Line charts and heat maps as SVG, on any machine: no font or image library of the system.
//!
//! `plotters` draws them, and measures text with a font that is compiled in. Which range an axis
//! shows is ours (`axis`), since a run that diverges has 1e30, NaN or nothing at all.

#![deny(unsafe_code)]

mod axis;
mod draw;
mod heat;
mod style;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// A picture: panels stacked under one title and one legend.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    /// The line at the top.
    pub title: String,
    /// From top to bottom.
    pub panels: Vec<Panel>,
}

/// One pair of axes.
#[derive(Clone, Debug, Default)]
pub struct Panel {
    /// A line above it, if it is not empty.
    pub title: String,
    /// What the x axis shows, with its unit.
    pub x_label: String,
    /// What the y axis shows, with its unit.
    pub y_label: String,
    /// What stands at x = 0, 1, 2, ... in place of numbers; empty for numbers.
    pub x_names: Vec<String>,
    /// Whether x is logarithmic: points with x <= 0 are left out.
    pub x_log: bool,
    /// Whether y is logarithmic: points with y <= 0 are left out.
    pub y_log: bool,
    /// The lines.
    pub series: Vec<Series>,
    /// Named levels, drawn as grey lines across the panel.
    pub horizontal: Vec<(String, f64)>,
}

/// One line with its markers.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// The legend's text; series of one name, in any panel, share an entry.
    pub name: String,
    /// (x, y) in order of x; a point that is not finite makes a gap.
    pub points: Vec<(f64, f64)>,
    /// Lines behind the main one, drawn thin: single seeds, for example.
    pub faint: Vec<Vec<(f64, f64)>>,
    /// Which colour and marker of the palette.
    pub color_index: usize,
    /// Whether the line is dashed.
    pub dashed: bool,
    /// Where it became NaN: each is a cross at the panel's top edge.
    pub nan_at: Vec<f64>,
}

/// Writes the chart to `stem.svg`, complete or not at all.
///
/// # Errors
/// When it cannot be drawn or the file cannot be written.
pub fn line_chart(spec: &Chart, stem: &Path) -> anyhow::Result<()> {
    write_whole(stem, &svg(spec)?)
}

/// The chart as an SVG document.
///
/// # Errors
/// When it cannot be drawn.
pub fn svg(spec: &Chart) -> anyhow::Result<String> {
    draw::svg(spec)
}

/// Values by name and x, such as the norm of each Var's gradient by step: light is large, on a
/// logarithmic scale.
#[derive(Clone, Debug, Default)]
pub struct HeatMap {
    /// The line at the top.
    pub title: String,
    /// What the x axis shows.
    pub x_label: String,
    /// What the colours show.
    pub value_label: String,
    /// The columns, each 1 after the one before.
    pub x: Vec<f64>,
    /// From top to bottom: a name, and a value a column; `None` is marked as missing, what is not
    /// finite and 0 have colours of their own. Values below 0 count as 0.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

/// Writes the map to `stem.svg`, complete or not at all.
///
/// # Errors
/// When it cannot be drawn or the file cannot be written.
pub fn heat_map(map: &HeatMap, stem: &Path) -> anyhow::Result<()> {
    write_whole(stem, &heat::svg(map)?)
}

/// Appends `.suffix`; unlike `Path::with_extension` it keeps a dot in the stem (`lr-0.1`).
fn with_suffix(stem: &Path, suffix: &str) -> PathBuf {
    let mut name = stem.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn write_whole(stem: &Path, svg: &str) -> anyhow::Result<()> {
    let (path, unfinished) = (with_suffix(stem, ".svg"), with_suffix(stem, ".svg.tmp"));
    let written = fs::write(&unfinished, svg).and_then(|()| fs::rename(&unfinished, &path));
    if written.is_err() {
        // The error that counts is the one of writing.
        let _ = fs::remove_file(&unfinished);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
