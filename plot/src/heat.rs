//! Heat maps: a row a name, a column an x, a colour a value on a logarithmic scale.

use std::ops::Range;

use plotters::prelude::*;
use plotters::style::colors::colormaps::ViridisRGB;
use plotters::style::text_anchor::HPos;

use super::HeatMap;
use super::axis::{Axis, position, shown};
use super::style::{
    self, Canvas, INK, MARGIN, TEXT_EM, TICK_EM, TITLE_HEIGHT, WIDTH, X_LABELS_HEIGHT,
};

const LEGEND_HEIGHT: i32 = 56;
/// Of a row, if there is room for it.
const ROW_HEIGHT: i32 = 31;
const MOST_ROWS_HEIGHT: i32 = 2400;
/// Columns of less than four pixels could not be told apart.
const COLUMNS: usize = 320;
const SHADES: u8 = 64;
/// Of the colour bar with its labels.
const BAR_WIDTH: i32 = 190;

/// What a cell shows. In the order of what counts more where several values share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Cell {
    Missing,
    Zero,
    /// From 0, the lowest, to [`SHADES`] - 1.
    Shade(u8),
    NonFinite,
}

impl Cell {
    fn new(value: Option<f64>, shown: &Range<f64>) -> Self {
        match value {
            None => Self::Missing,
            Some(value) if !value.is_finite() => Self::NonFinite,
            Some(value) => position(value, true).map_or(Self::Zero, |at| {
                let share = (at - shown.start) / (shown.end - shown.start);
                Self::Shade((share.clamp(0.0, 1.0) * f64::from(SHADES - 1)).round() as u8)
            }),
        }
    }

    fn color(self) -> RGBColor {
        match self {
            Self::Missing => RGBColor(200, 200, 200),
            Self::Zero => WHITE,
            Self::Shade(shade) => ViridisRGB.get_color(f32::from(shade) / f32::from(SHADES - 1)),
            Self::NonFinite => RGBColor(220, 0, 0),
        }
    }
}

/// The cells of a row: each shows what counts most of `stretch` values.
fn cells(values: &[Option<f64>], stretch: usize, shown: &Range<f64>) -> Vec<Cell> {
    let most = |values: &[Option<f64>]| {
        let cells = values.iter().map(|value| Cell::new(*value, shown));
        cells.max().unwrap_or(Cell::Missing)
    };
    values.chunks(stretch).map(most).collect()
}

/// Draws the map as an SVG document.
pub(super) fn svg(map: &HeatMap) -> anyhow::Result<String> {
    let stretch = map.x.len().div_ceil(COLUMNS).max(1);
    let values = map.rows.iter().flat_map(|(_, values)| values);
    let range = shown(values.copied().flatten(), true, true);
    let row_cells = map.rows.iter();
    let row_cells = row_cells.map(|(_, values)| cells(values, stretch, &range));
    let rows: Vec<Vec<Cell>> = row_cells.collect();
    let count = i32::try_from(rows.len())?;
    let row_height = (MOST_ROWS_HEIGHT / count.max(1)).clamp(2, ROW_HEIGHT);
    let rows_height = (row_height * count).max(4 * ROW_HEIGHT);
    let top = TITLE_HEIGHT + LEGEND_HEIGHT;
    let height = top + rows_height + X_LABELS_HEIGHT + MARGIN;
    style::picture(&map.title, height, |canvas| {
        legend(canvas, map, &rows)?;
        let (_, below) = canvas.split_vertically(top);
        let (area, bar) = below.split_horizontally(WIDTH - BAR_WIDTH);
        draw_rows(&area, map, &rows, stretch, row_height)?;
        draw_bar(&bar, &Axis::new(range, true, 8))
    })
}

fn draw_rows(
    area: &Canvas,
    map: &HeatMap,
    rows: &[Vec<Cell>],
    stretch: usize,
    row_height: i32,
) -> anyhow::Result<()> {
    let every = usize::try_from((ROW_HEIGHT - 3) / row_height + 1)?;
    let named = map.rows.iter().enumerate();
    let names = named.map(|(at, (name, _))| {
        let name = if at.is_multiple_of(every) { name } else { "" };
        style::printable(name)
    });
    // The first at the top, where an axis ends.
    let names: Vec<String> = names.rev().collect();
    let labels_width = style::widest(names.iter(), TICK_EM)? + 30;
    let ends = [map.x.first(), map.x.last()].map(|end| end.copied().unwrap_or(0.0));
    let x = Axis::new(ends[0] - 0.5..ends[1] + 0.5, false, 8);
    let y = Axis::named(&names);
    let x_label = match stretch {
        1 => map.x_label.clone(),
        _ => format!("{} (the largest of {stretch} in each column)", map.x_label),
    };
    let mut plot = ChartBuilder::on(area)
        .margin_left(MARGIN / 2)
        .margin_right(MARGIN)
        .margin_bottom(MARGIN)
        .x_label_area_size(X_LABELS_HEIGHT)
        .y_label_area_size(labels_width.min(WIDTH / 2))
        .build_cartesian_2d(x.clone(), y.clone())?;
    plot.configure_mesh()
        .disable_mesh()
        .axis_style(INK.stroke_width(3))
        .set_all_tick_mark_size(8)
        .label_style(style::text(TICK_EM, HPos::Center))
        .axis_desc_style(style::text(TEXT_EM, HPos::Center))
        .x_desc(style::printable(&x_label))
        .draw()?;
    let edge = |column: usize| ends[0] - 0.5 + (column * stretch).min(map.x.len()) as f64;
    for (row, cells) in rows.iter().rev().enumerate() {
        let (bottom, middle, top) = (row as f64 - 0.5, row as f64, row as f64 + 0.5);
        let mut column = 0;
        for same in cells.chunk_by(|a, b| a == b) {
            let (left, right) = (edge(column), edge(column + same.len()));
            column += same.len();
            let corners = [(left, top), (right, bottom)];
            plot.draw_series([Rectangle::new(corners, same[0].color().filled())])?;
            if same[0] == Cell::Missing {
                // Struck through, to be told from a value.
                let line = [(left, middle), (right, middle)];
                plot.draw_series([PathElement::new(line, INK.stroke_width(2))])?;
            }
        }
    }
    Ok(())
}

/// The colour bar.
fn draw_bar(area: &Canvas, axis: &Axis) -> anyhow::Result<()> {
    let mut plot = ChartBuilder::on(area)
        .margin_right(MARGIN)
        .margin_bottom(MARGIN + X_LABELS_HEIGHT)
        .right_y_label_area_size(BAR_WIDTH - MARGIN - 44)
        .build_cartesian_2d(0.0..1.0, axis.clone())?;
    plot.configure_mesh()
        .disable_mesh()
        .disable_x_axis()
        .axis_style(INK.stroke_width(3))
        .set_all_tick_mark_size(8)
        .label_style(style::text(TICK_EM, HPos::Left))
        .draw()?;
    let Range { start, end } = axis.shown;
    let at = |shade: u8| start + (end - start) * f64::from(shade) / f64::from(SHADES);
    plot.draw_series((0..SHADES).map(|shade| {
        let corners = [(0.0, at(shade)), (1.0, at(shade + 1))];
        Rectangle::new(corners, Cell::Shade(shade).color().filled())
    }))?;
    Ok(())
}

/// What the colour bar shows, and what the cells mean that it doesn't have.
fn legend(canvas: &Canvas, map: &HeatMap, rows: &[Vec<Cell>]) -> anyhow::Result<()> {
    let y = TITLE_HEIGHT + LEGEND_HEIGHT / 2;
    let marks = [
        (Cell::Missing, "missing"),
        (Cell::Zero, "zero"),
        (Cell::NonFinite, "NaN or infinite"),
    ];
    let mut x = MARGIN;
    for (cell, meaning) in marks {
        if !rows.iter().flatten().any(|other| *other == cell) {
            continue;
        }
        let corners = [(x, y - 14), (x + 60, y + 14)];
        canvas.draw(&Rectangle::new(corners, cell.color().filled()))?;
        canvas.draw(&Rectangle::new(corners, INK.stroke_width(2)))?;
        let text = style::text(TEXT_EM, HPos::Left);
        canvas.draw(&Text::new(meaning, (x + 78, y), text))?;
        x += 78 + style::text_width(meaning, TEXT_EM)? + 56;
    }
    let label = style::printable(&map.value_label);
    let em = style::fitting_em(&label, TEXT_EM, WIDTH - MARGIN - x)?;
    let text = style::text(em, HPos::Right);
    canvas.draw(&Text::new(label, (WIDTH - MARGIN, y), text))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_shows_what_counts_most() {
        let of = |values: &[Option<f64>], stretch| cells(values, stretch, &(0.0..3.0)); // 1 to 1000
        let values = [1.0, 1000.0, 1e-9, 1e9, 0.0, f64::NAN, f64::INFINITY].map(Some);
        let (low, high, bad) = (Cell::Shade(0), Cell::Shade(SHADES - 1), Cell::NonFinite);
        let each = [low, high, low, high, Cell::Zero, bad, bad];
        assert_eq!(of(&values, 1), each);
        assert_eq!(of(&values, 3), [high, bad, bad]);
        let zeros = [None, None, None, Some(0.0)];
        assert_eq!(of(&zeros, 2), [Cell::Missing, Cell::Zero]);
    }
}
