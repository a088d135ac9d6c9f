//! The layout of a chart, and its SVG.

use anyhow::Context;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::axis::Axis;
use super::data::pieces;
use super::legend::Legend;
use super::range::{position, spanning, within, without_outliers};
use super::style::{
    self, CROSS, CROSS_HEIGHT, Canvas, LINE, MARGIN, Pixel, SERIES_DASH, TEXT_EM, THIN_LINE,
    TICK_EM, TITLE_EM, WIDTH,
};
use super::{Chart, Panel, Series};

const TITLE_HEIGHT: i32 = 84;
/// Of one panel; many share the room of four, down to a height at which an axis still has its labels.
const PANEL_HEIGHT: i32 = 700;
const LEAST_PANEL_HEIGHT: i32 = 360;
const X_LABELS_HEIGHT: i32 = 96;
/// What the y axis needs beside its tick labels: tick marks and the axis' own label.
const Y_LABEL_WIDTH: i32 = 80;
/// At most this many labels an axis.
const TICKS: usize = 8;
/// A line of more points than this is drawn thinner, with a marker now and then: a marker a point would hide it.
const MANY: usize = 24;
const MARKER_SPACING: i32 = 140;

/// Draws the chart as an SVG document.
pub(super) fn svg(chart: &Chart) -> anyhow::Result<String> {
    style::load_font()?;
    let legend = Legend::new(chart)?;
    let top = TITLE_HEIGHT + legend.height();
    let panel_height = panel_height(chart.panels.len());
    let panels_height = i32::try_from(chart.panels.len())
        .ok()
        .and_then(|n| n.checked_mul(panel_height));
    let height = panels_height
        .and_then(|height| height.checked_add(top + MARGIN))
        .context("too many panels for one picture")?;
    let size = (WIDTH as u32, height as u32);

    let mut document = String::new();
    {
        let canvas = SVGBackend::with_string(&mut document, size).into_drawing_area();
        canvas.fill(&WHITE)?;
        let title = style::printable(&chart.title);
        let em = style::fitting_em(&title, TITLE_EM, WIDTH - 2 * MARGIN)?;
        let middle = (WIDTH / 2, TITLE_HEIGHT / 2);
        canvas.draw(&Text::new(title, middle, style::text(em, HPos::Center)))?;
        legend.draw(&canvas, TITLE_HEIGHT)?;
        draw_panels(&chart.panels, &canvas, top)?;
        canvas.present()?;
    }
    Ok(document)
}

fn draw_panels(panels: &[Panel], canvas: &Canvas, top: i32) -> anyhow::Result<()> {
    let height = panel_height(panels.len());
    let axes: Vec<(Axis, Axis)> = panels.iter().map(|panel| axes_of(panel, height)).collect();
    let mut widest_label = 0;
    for (_, y) in &axes {
        for tick in &y.ticks {
            widest_label = widest_label.max(style::text_width(&y.label(*tick), TICK_EM)?);
        }
    }
    let mut rest = canvas.split_vertically(top).1;
    for (panel, (x, y)) in panels.iter().zip(&axes) {
        let (area, below) = rest.split_vertically(height);
        rest = below;
        draw_panel(panel, x, y, canvas, &area, widest_label + Y_LABEL_WIDTH)?;
    }
    Ok(())
}

fn panel_height(panels: usize) -> i32 {
    let shared = 4 * PANEL_HEIGHT as usize / panels.max(1);
    (shared as i32).clamp(LEAST_PANEL_HEIGHT, PANEL_HEIGHT)
}

fn axes_of(panel: &Panel, height: i32) -> (Axis, Axis) {
    let points = || {
        let lines = panel
            .series
            .iter()
            .flat_map(|s| s.faint.iter().chain([&s.points]));
        lines.flatten().copied()
    };
    let crosses = panel.series.iter().flat_map(|s| s.nan_at.iter().copied());
    let levels = panel.horizontal.iter().map(|(_, level)| *level);
    let x = spanning(points().map(|p| p.0).chain(crosses), panel.x_log);
    let diverging = panel
        .series
        .iter()
        .filter(|s| s.nan_at.iter().any(|x| x.is_finite()))
        .count();
    let headroom = f64::from(CROSS_HEIGHT) * diverging.min(6) as f64 / f64::from(height);
    let y = without_outliers(points().map(|p| p.1).chain(levels), panel.y_log, headroom);
    let x = if panel.x_names.is_empty() {
        Axis::new(x, panel.x_log, TICKS)
    } else {
        Axis::named(&panel.x_names)
    };
    (
        x,
        Axis::new(
            y,
            panel.y_log,
            TICKS * height as usize / PANEL_HEIGHT as usize,
        ),
    )
}

fn draw_panel(
    panel: &Panel,
    x: &Axis,
    y: &Axis,
    canvas: &Canvas,
    area: &Canvas,
    labels_width: i32,
) -> anyhow::Result<()> {
    let mut chart = ChartBuilder::on(area)
        .margin_left(MARGIN / 2)
        .margin_right(MARGIN + 10)
        .margin_top(MARGIN / 2)
        .x_label_area_size(X_LABELS_HEIGHT)
        .y_label_area_size(labels_width)
        .build_cartesian_2d(x.clone(), y.clone())?;
    let plot_height = area.dim_in_pixel().1 as i32 - X_LABELS_HEIGHT;
    let label_em = style::fitting_em(&panel.y_label, TEXT_EM, plot_height)?;
    chart
        .configure_mesh()
        .bold_line_style(style::GRID.stroke_width(2))
        .light_line_style(style::FAINT_GRID.stroke_width(2))
        .axis_style(style::INK.stroke_width(3))
        .set_all_tick_mark_size(10)
        .label_style(style::text(TICK_EM, HPos::Center))
        .axis_desc_style(style::text(label_em, HPos::Center))
        .x_desc(style::printable(&panel.x_label))
        .y_desc(style::printable(&panel.y_label))
        .draw()?;

    let pixel = |(px, py): (f64, f64)| chart.backend_coord(&(px, py));
    for (index, (_, level)) in panel.horizontal.iter().enumerate() {
        if let Some(at) = position(*level, panel.y_log).filter(|at| within(&y.shown, *at)) {
            let ends = [x.shown.start, x.shown.end].map(|end| pixel((end, at)));
            style::level(canvas, ends, index)?;
        }
    }
    for series in &panel.series {
        draw_series(series, panel, y, canvas, &pixel)?;
    }
    draw_crosses(panel, canvas, |at| pixel((at, y.shown.end)))
}

fn draw_series(
    series: &Series,
    panel: &Panel,
    y: &Axis,
    canvas: &Canvas,
    pixel: &dyn Fn((f64, f64)) -> Pixel,
) -> anyhow::Result<()> {
    let color = style::color(series.color_index);
    let path_of = |points: &[(f64, f64)]| -> Vec<Vec<Pixel>> {
        let pieces = pieces(points, panel.x_log, &y.shown, panel.y_log);
        pieces
            .into_iter()
            .map(|piece| piece.into_iter().map(pixel).collect())
            .collect()
    };
    for seed in &series.faint {
        for path in path_of(seed) {
            style::stroke(canvas, &path, None, color.mix(0.45).stroke_width(THIN_LINE))?;
        }
    }
    let dash = series.dashed.then_some(SERIES_DASH);
    let width = if series.points.len() > MANY {
        LINE - 1
    } else {
        LINE
    };
    for path in path_of(&series.points) {
        style::stroke(canvas, &path, dash, color.stroke_width(width))?;
    }
    let points: Vec<Pixel> = series
        .points
        .iter()
        .filter_map(|(px, py)| Some((position(*px, panel.x_log)?, position(*py, panel.y_log)?)))
        .filter(|point| within(&y.shown, point.1))
        .map(pixel)
        .collect();
    for at in marked(&points, series.color_index) {
        style::marker(canvas, at, series.color_index)?;
    }
    Ok(())
}

/// The points that get a marker: all of a few, and some of many, at other places for another colour, so that
/// lines on top of each other can be told apart.
fn marked(points: &[Pixel], color_index: usize) -> Vec<Pixel> {
    let (Some((start, _)), true) = (points.first(), points.len() > MANY) else {
        return points.to_vec();
    };
    let places = 2 * style::COLORS;
    let mut next = start + MARKER_SPACING / places as i32 * (color_index % places) as i32;
    let mut chosen = Vec::new();
    for at in points {
        if at.0 >= next {
            chosen.push(*at);
            next = at.0 + MARKER_SPACING;
        }
    }
    chosen
}

/// Crosses at the top edge, stacked where several series became NaN at the same x.
fn draw_crosses(panel: &Panel, canvas: &Canvas, top: impl Fn(f64) -> Pixel) -> anyhow::Result<()> {
    let mut taken: Vec<Pixel> = Vec::new();
    for series in &panel.series {
        let mut columns: Vec<Pixel> = series
            .nan_at
            .iter()
            .filter_map(|x| position(*x, panel.x_log))
            .map(&top)
            .collect();
        columns.sort_unstable();
        columns.dedup();
        for (x, edge) in columns {
            let near = taken
                .iter()
                .filter(|(other, _)| (other - x).abs() < 2 * CROSS);
            let y = near.fold(edge + CROSS + 4, |y, _| y + CROSS_HEIGHT);
            style::cross(canvas, (x, y), style::color(series.color_index))?;
            taken.push((x, edge));
        }
    }
    Ok(())
}
