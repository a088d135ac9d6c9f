//! The layout of a chart, and its SVG.

use plotters::chart::ChartContext;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::axis::{Axis, position, shown};
use super::style::{
    self, CROSS, Canvas, INK, LINE, MARGIN, TEXT_EM, TICK_EM, TITLE_HEIGHT, WIDTH, X_LABELS_HEIGHT,
};
use super::{Chart, Panel, Series};

/// Of one panel; many share the room of four, down to a height at which an axis still has its
/// labels.
const PANEL_HEIGHT: i32 = 700;
const LEAST_PANEL_HEIGHT: i32 = 400;
/// What the y axis needs beside its tick labels: tick marks and the axis' own label.
const Y_LABEL_WIDTH: i32 = 80;
/// At most this many labels an axis.
const TICKS: i32 = 8;
/// A line of more points than this has a marker now and then: a marker a point would hide it.
const MANY: usize = 24;
const LEGEND_ROW: i32 = 52;
const SAMPLE_WIDTH: i32 = 84;
/// Dash and gap of a dashed series, and of named levels, by their order.
const SERIES_DASH: (i32, i32) = (18, 12);
const LEVEL_DASHES: [(i32, i32); 3] = [(28, 12), (7, 10), (16, 22)];

type Point = (f64, f64);
type Plot<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

/// Draws the chart as an SVG document.
pub(super) fn svg(chart: &Chart) -> anyhow::Result<String> {
    style::load_font()?;
    let panels = i32::try_from(chart.panels.len())?;
    let height = (4 * PANEL_HEIGHT / panels.max(1)).clamp(LEAST_PANEL_HEIGHT, PANEL_HEIGHT);
    let entries = entries(chart);
    let top = TITLE_HEIGHT + legend_grid(&entries)?.0 * LEGEND_ROW;
    style::picture(&chart.title, top + panels * height + MARGIN, |canvas| {
        legend(canvas, &entries)?;
        let axes: Vec<_> = chart
            .panels
            .iter()
            .map(|panel| axes_of(panel, height))
            .collect();
        let labels = axes.iter().flat_map(|(_, y)| y.labels());
        let widest = style::widest(labels, TICK_EM)?;
        let mut rest = canvas.split_vertically(top).1;
        for (panel, (x, y)) in chart.panels.iter().zip(&axes) {
            let (area, below) = rest.split_vertically(height);
            rest = below;
            draw_panel(panel, [x, y], &area, height, widest + Y_LABEL_WIDTH)?;
        }
        Ok(())
    })
}

fn axes_of(panel: &Panel, height: i32) -> (Axis, Axis) {
    let series = || panel.series.iter();
    let points = || {
        series()
            .flat_map(|s| s.faint.iter().chain([&s.points]))
            .flatten()
    };
    let crosses = series().flat_map(|s| &s.nan_at).copied();
    let levels = panel.horizontal.iter().map(|(_, level)| *level);
    let x = if panel.x_names.is_empty() {
        let values = points().map(|p| p.0).chain(crosses);
        Axis::new(
            shown(values, panel.x_log, false),
            panel.x_log,
            TICKS as usize,
        )
    } else {
        Axis::named(&panel.x_names)
    };
    let mut range = shown(points().map(|p| p.1).chain(levels), panel.y_log, true);
    let diverging = series().filter(|s| s.nan_at.iter().any(|x| x.is_finite()));
    let rows = diverging.count().min(6) as f64;
    range.end += f64::from(3 * CROSS) * rows / f64::from(height) * (range.end - range.start);
    let room = TICKS * height / PANEL_HEIGHT;
    (x, Axis::new(range, panel.y_log, room as usize))
}

fn draw_panel(
    panel: &Panel,
    [x, y]: [&Axis; 2],
    area: &Canvas,
    height: i32,
    labels_width: i32,
) -> anyhow::Result<()> {
    let mut builder = ChartBuilder::on(area);
    builder
        .margin_left(MARGIN / 2)
        .margin_right(MARGIN + 10)
        .margin_top(MARGIN / 2)
        .x_label_area_size(X_LABELS_HEIGHT)
        .y_label_area_size(labels_width);
    if !panel.title.is_empty() {
        builder.caption(
            style::printable(&panel.title),
            style::text(TEXT_EM, HPos::Left),
        );
    }
    let mut plot = builder.build_cartesian_2d(x.clone(), y.clone())?;
    let label_em = style::fitting_em(&panel.y_label, TEXT_EM, height - X_LABELS_HEIGHT)?;
    plot.configure_mesh()
        .bold_line_style(RGBColor(215, 215, 215).stroke_width(2))
        .light_line_style(RGBColor(238, 238, 238).stroke_width(2))
        .axis_style(INK.stroke_width(3))
        .set_all_tick_mark_size(10)
        .label_style(style::text(TICK_EM, HPos::Center))
        .axis_desc_style(style::text(label_em, HPos::Center))
        .x_desc(style::printable(&panel.x_label))
        .y_desc(style::printable(&panel.y_label))
        .draw()?;
    for (index, (_, level)) in panel.horizontal.iter().enumerate() {
        if let Some(at) = position(*level, panel.y_log).filter(|at| y.shown.contains(at)) {
            let ends = [(x.shown.start, at), (x.shown.end, at)];
            plot.draw_series([level_line(ends, index)])?;
        }
    }
    let mut diverging = 0;
    for series in &panel.series {
        draw_series(series, panel, y, &mut plot)?;
        let crosses = series.nan_at.iter();
        let crosses: Vec<f64> = crosses.filter_map(|x| position(*x, panel.x_log)).collect();
        let below = CROSS + 4 + diverging % 6 * 3 * CROSS;
        diverging += i32::from(!crosses.is_empty());
        plot.draw_series(crosses.into_iter().map(|x| {
            let [first, second] = style::cross(below, style::color(series.color_index));
            EmptyElement::at((x, y.shown.end)) + first + second
        }))?;
    }
    Ok(())
}

fn draw_series(series: &Series, panel: &Panel, y: &Axis, plot: &mut Plot) -> anyhow::Result<()> {
    let color = style::color(series.color_index);
    let place = |(px, py): &Point| Some((position(*px, panel.x_log)?, position(*py, panel.y_log)?));
    for faint in &series.faint {
        for piece in pieces(faint.iter().map(place), y) {
            plot.draw_series([PathElement::new(piece, color.mix(0.45).stroke_width(2))])?;
        }
    }
    let is_long = series.points.len() > MANY;
    let style = color.stroke_width(LINE - u32::from(is_long));
    for piece in pieces(series.points.iter().map(place), y) {
        if series.dashed {
            plot.draw_series([dashed(piece, style)])?;
        } else {
            plot.draw_series([PathElement::new(piece, style)])?;
        }
    }
    let points = series.points.iter().filter_map(place);
    let points: Vec<Point> = points.filter(|point| y.shown.contains(&point.1)).collect();
    // Some of many, at other places for another colour, so that lines on top of each other can be
    // told apart.
    let stride = if is_long {
        points.len().div_ceil(14)
    } else {
        1
    };
    let skip = stride * (series.color_index % 14) / 14;
    plot.draw_series(
        points
            .into_iter()
            .skip(skip)
            .step_by(stride.max(1))
            .map(|at| {
                let [outer, inner] = style::marker(series.color_index);
                EmptyElement::at(at) + outer + inner
            }),
    )?;
    Ok(())
}

/// The pieces of a line between gaps. What leaves the panel ends at its edge.
fn pieces(points: impl Iterator<Item = Option<Point>>, y: &Axis) -> Vec<Vec<Point>> {
    let edge = |at: Point| (at.0, at.1.clamp(y.shown.start, y.shown.end));
    let points: Vec<Option<Point>> = points.collect();
    let mut pieces = Vec::new();
    for run in points.split(Option::is_none) {
        let run: Vec<Point> = run.iter().flatten().copied().collect();
        let is_outside = |at: &Point| edge(*at) != *at;
        let stays_inside = |a: &Point, b: &Point| !(is_outside(a) && is_outside(b));
        for piece in run.chunk_by(stays_inside).filter(|piece| piece.len() > 1) {
            pieces.push(piece.iter().map(|at| edge(*at)).collect());
        }
    }
    pieces
}

/// A dashed series' line.
fn dashed<C: Clone>(
    path: Vec<C>,
    style: ShapeStyle,
) -> DashedPathElement<std::vec::IntoIter<C>, i32> {
    let (dash, gap) = SERIES_DASH;
    DashedPathElement::new(path, dash, gap, style)
}

/// The line of a named level.
fn level_line<C: Clone>(
    ends: [C; 2],
    index: usize,
) -> DashedPathElement<std::array::IntoIter<C, 2>, i32> {
    let (dash, gap) = LEVEL_DASHES[index % LEVEL_DASHES.len()];
    let style = INK.mix(0.75).stroke_width(LINE - 1);
    DashedPathElement::new(ends, dash, gap, style)
}

enum Sample<'a> {
    Series(&'a Series),
    Level(usize),
    Diverged,
}

/// What the legend explains, each name once: lines, then levels, then the cross.
fn entries(chart: &Chart) -> Vec<(String, Sample<'_>)> {
    let mut entries: Vec<(String, Sample)> = Vec::new();
    let series = || chart.panels.iter().flat_map(|panel| &panel.series);
    let lines = series().map(|series| (&series.name, Sample::Series(series)));
    let levels = chart
        .panels
        .iter()
        .flat_map(|panel| panel.horizontal.iter().enumerate());
    let levels = levels.map(|(index, (name, _))| (name, Sample::Level(index)));
    for (name, sample) in lines.chain(levels) {
        let name = style::printable(name);
        if !name.is_empty() && entries.iter().all(|(known, _)| *known != name) {
            entries.push((name, sample));
        }
    }
    if series()
        .flat_map(|series| &series.nan_at)
        .any(|x| x.is_finite())
    {
        entries.push(("diverged (NaN)".into(), Sample::Diverged));
    }
    entries
}

/// How many rows and columns the entries fill, and how wide each is.
fn legend_grid(entries: &[(String, Sample)]) -> anyhow::Result<(i32, i32, i32)> {
    let names = entries.iter().map(|(name, _)| name);
    let width = SAMPLE_WIDTH + 18 + 56 + style::widest(names, TEXT_EM)?;
    let columns = ((WIDTH - MARGIN) / width).max(1);
    let count = i32::try_from(entries.len())?;
    Ok(((count + columns - 1) / columns, columns, width))
}

/// A separate strip above the panels, so that it never covers data.
fn legend(canvas: &Canvas, entries: &[(String, Sample)]) -> anyhow::Result<()> {
    let (_, columns, width) = legend_grid(entries)?;
    for (i, (name, sample)) in (0..).zip(entries) {
        let x = MARGIN + i % columns * width;
        let y = TITLE_HEIGHT + i / columns * LEGEND_ROW + LEGEND_ROW / 2;
        let ends = [(x, y), (x + SAMPLE_WIDTH, y)];
        let middle = || EmptyElement::at((x + SAMPLE_WIDTH / 2, y));
        match sample {
            Sample::Series(series) => {
                let line = style::color(series.color_index).stroke_width(LINE);
                if series.dashed {
                    canvas.draw(&dashed(ends.to_vec(), line))?;
                } else {
                    canvas.draw(&PathElement::new(ends, line))?;
                }
                let [outer, inner] = style::marker(series.color_index);
                canvas.draw(&(middle() + outer + inner))?;
            }
            Sample::Level(index) => {
                canvas.draw(&level_line(ends, *index))?;
            }
            Sample::Diverged => {
                let [first, second] = style::cross(0, INK);
                canvas.draw(&(middle() + first + second))?;
            }
        }
        let place = (x + SAMPLE_WIDTH + 18, y);
        canvas.draw(&Text::new(
            name.as_str(),
            place,
            style::text(TEXT_EM, HPos::Left),
        ))?;
    }
    Ok(())
}
