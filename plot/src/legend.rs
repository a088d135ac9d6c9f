//! The legend: a strip of its own above the panels, so that it never covers data.

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::style::{self, Canvas, LINE, MARGIN, Pixel, SERIES_DASH, TEXT_EM, WIDTH};
use super::{Chart, Series};

const ROW_HEIGHT: i32 = 52;
const SAMPLE_WIDTH: i32 = 84;
const GAP: i32 = 18;
const SPACING: i32 = 56;

enum Sample<'a> {
    Series(&'a Series),
    Level(usize),
    Diverged,
}

/// An entry with its place.
struct Entry<'a> {
    name: String,
    sample: Sample<'a>,
    at: Pixel,
}

/// All entries of a chart, laid out in rows.
pub(super) struct Legend<'a> {
    entries: Vec<Entry<'a>>,
    rows: i32,
}

impl<'a> Legend<'a> {
    pub(super) fn new(chart: &'a Chart) -> anyhow::Result<Self> {
        let mut entries: Vec<Entry> = Vec::new();
        let (mut x, mut rows) = (MARGIN, 1);
        for (name, sample) in samples(chart) {
            let name = style::printable(name);
            let width = SAMPLE_WIDTH + GAP + style::text_width(&name, TEXT_EM)?;
            if x + width > WIDTH - MARGIN && x > MARGIN {
                x = MARGIN;
                rows += 1;
            }
            entries.push(Entry {
                name,
                sample,
                at: (x, rows * ROW_HEIGHT - ROW_HEIGHT / 2),
            });
            x += width + SPACING;
        }
        Ok(Self {
            rows: if entries.is_empty() { 0 } else { rows },
            entries,
        })
    }

    pub(super) fn height(&self) -> i32 {
        self.rows * ROW_HEIGHT
    }

    /// Draws it with its top at `top`.
    pub(super) fn draw(&self, canvas: &Canvas, top: i32) -> anyhow::Result<()> {
        for Entry {
            name,
            sample,
            at: (x, y),
        } in &self.entries
        {
            let (x, y) = (*x, y + top);
            let ends = [(x, y), (x + SAMPLE_WIDTH, y)];
            let middle = (x + SAMPLE_WIDTH / 2, y);
            match sample {
                Sample::Series(series) => {
                    let dash = series.dashed.then_some(SERIES_DASH);
                    let line = style::color(series.color_index).stroke_width(LINE);
                    style::stroke(canvas, &ends, dash, line)?;
                    style::marker(canvas, middle, series.color_index)?;
                }
                Sample::Level(index) => style::level(canvas, ends, *index)?,
                Sample::Diverged => style::cross(canvas, middle, style::INK)?,
            }
            let label = style::text(TEXT_EM, HPos::Left);
            canvas.draw(&Text::new(
                name.as_str(),
                (x + SAMPLE_WIDTH + GAP, y),
                label,
            ))?;
        }
        Ok(())
    }
}

/// Each name once: lines, then levels, then the cross.
fn samples(chart: &Chart) -> Vec<(&str, Sample<'_>)> {
    let mut samples: Vec<(&str, Sample)> = Vec::new();
    let mut add = |name, sample| {
        if !samples.iter().any(|(known, _)| *known == name) {
            samples.push((name, sample));
        }
    };
    for series in chart.panels.iter().flat_map(|panel| &panel.series) {
        add(series.name.as_str(), Sample::Series(series));
    }
    for panel in &chart.panels {
        for (index, (name, _)) in panel.horizontal.iter().enumerate() {
            add(name, Sample::Level(index));
        }
    }
    let mut crosses = chart
        .panels
        .iter()
        .flat_map(|panel| &panel.series)
        .flat_map(|series| &series.nan_at);
    if crosses.any(|x| x.is_finite()) {
        add("diverged (NaN)", Sample::Diverged);
    }
    samples.retain(|(name, _)| !name.is_empty());
    samples
}
