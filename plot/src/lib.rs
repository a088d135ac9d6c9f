//! Line charts and heat maps as SVG and PNG, on any machine: no system font, no font or image library of the system.
//!
//! `plotters` draws the SVG, `resvg` renders the PNG from that SVG, so both show the same picture, and a font is compiled in.
//! Which range an axis shows is ours (`axis`), since a run that diverges has 1e30, NaN or nothing at all.

#![deny(unsafe_code)]

mod axis;
mod draw;
mod heat;
mod style;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use resvg::tiny_skia::{Color, Pixmap, Transform};
use resvg::usvg::{Options, Tree, fontdb::Database};

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

/// Writes the chart to `stem.svg` and `stem.png`, each complete or not at all.
///
/// # Errors
/// When a picture cannot be drawn or a file cannot be written.
pub fn line_chart(spec: &Chart, stem: &Path) -> anyhow::Result<()> {
    write(&svg(spec)?, stem)
}

/// The chart as an SVG document.
///
/// # Errors
/// When it cannot be drawn.
pub fn svg(spec: &Chart) -> anyhow::Result<String> {
    draw::svg(spec)
}

fn write(svg: &str, stem: &Path) -> anyhow::Result<()> {
    let png = png(svg)?;
    let vector = write_whole(&with_suffix(stem, "svg"), svg.as_bytes());
    vector.and(write_whole(&with_suffix(stem, "png"), &png))
}

/// Renders an SVG at its own size on white.
fn png(svg: &str) -> anyhow::Result<Vec<u8>> {
    let mut fonts = Database::new();
    fonts.load_font_data(style::font().to_vec());
    let options = Options {
        fontdb: Arc::new(fonts),
        ..Options::default()
    };
    let tree = Tree::from_str(svg, &options).context("cannot read the chart's SVG back")?;
    let size = tree.size().to_int_size();
    let pixels = Pixmap::new(size.width(), size.height());
    let mut pixels = pixels.context("no memory for the picture")?;
    pixels.fill(Color::WHITE);
    resvg::render(&tree, Transform::identity(), &mut pixels.as_mut());
    pixels
        .encode_png()
        .context("cannot encode the chart as PNG")
}

/// Values by name and x, such as the norm of each Var's gradient by step: light is large, on a logarithmic scale.
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
    /// From top to bottom: a name, and a value a column; `None` is marked as missing, what is not finite and 0 have
    /// colours of their own. Values below 0 count as 0.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

/// Writes the map to `stem.svg` and `stem.png`, each complete or not at all.
///
/// # Errors
/// When a picture cannot be drawn or a file cannot be written.
pub fn heat_map(map: &HeatMap, stem: &Path) -> anyhow::Result<()> {
    write(&heat::svg(map)?, stem)
}

/// Appends `.suffix`; unlike `Path::with_extension` it keeps a dot in the stem (`lr-0.1`).
fn with_suffix(stem: &Path, suffix: &str) -> PathBuf {
    let mut name = stem.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let unfinished = with_suffix(path, "tmp");
    let written = fs::write(&unfinished, bytes).and_then(|()| fs::rename(&unfinished, path));
    if written.is_err() {
        // The error that counts is the one of writing.
        let _ = fs::remove_file(&unfinished);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
