//! Heat maps: a row a name, a column an x, a colour a value on a logarithmic scale.

use std::ops::Range;

use plotters::prelude::*;
use plotters::style::colors::colormaps::ViridisRGB;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::HeatMap;
use super::axis::Axis;
use super::range::{position, without_outliers};
use super::style::{self, Canvas, MARGIN, Pixel, TEXT_EM, TICK_EM, TITLE_EM, WIDTH};

const TITLE_HEIGHT: i32 = 84;
const LEGEND_HEIGHT: i32 = 56;
const X_LABELS_HEIGHT: i32 = 96;
/// Of a row, if there is room for it.
const ROW_HEIGHT: i32 = 31;
const MOST_ROWS_HEIGHT: i32 = 2400;
/// Columns of less than four pixels could not be told apart.
const COLUMNS: usize = 320;
const SHADES: u8 = 64;
const BAR_WIDTH: i32 = 44;
const TICKS: usize = 8;

/// What a cell shows. In the order of what counts more where several values share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cell {
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

    /// Text for the legend.
    fn meaning(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Zero => "zero",
            Self::Shade(_) => "finite",
            Self::NonFinite => "NaN or infinite",
        }
    }
}

/// The cells of a row: each shows what counts most of `stretch` values.
pub(super) fn cells(values: &[Option<f64>], stretch: usize, shown: &Range<f64>) -> Vec<Cell> {
    let most = |values: &[Option<f64>]| {
        let cells = values.iter().map(|value| Cell::new(*value, shown));
        cells.max().unwrap_or(Cell::Missing)
    };
    values.chunks(stretch.max(1)).map(most).collect()
}

/// Draws the map as an SVG document.
pub(super) fn svg(map: &HeatMap) -> anyhow::Result<String> {
    style::load_font()?;
    let columns = map.x.len();
    let stretch = columns.div_ceil(COLUMNS).max(1);
    let values = map.rows.iter().flat_map(|(_, values)| values);
    let shown = without_outliers(values.copied().flatten(), true, 0.0);
    let rows: Vec<Vec<Cell>> = map
        .rows
        .iter()
        .map(|(_, values)| cells(values, stretch, &shown))
        .collect();

    let row_height = (MOST_ROWS_HEIGHT / rows.len().max(1) as i32).clamp(2, ROW_HEIGHT);
    let rows_height = (row_height * rows.len() as i32).max(4 * ROW_HEIGHT);
    let marks = [Cell::Missing, Cell::Zero, Cell::NonFinite];
    let marks: Vec<Cell> = marks
        .into_iter()
        .filter(|mark| rows.iter().flatten().any(|cell| cell == mark))
        .collect();
    let legend_height = if marks.is_empty() { 0 } else { LEGEND_HEIGHT };
    let top = TITLE_HEIGHT + legend_height;
    let size = (WIDTH, top + rows_height + X_LABELS_HEIGHT + MARGIN);
    let mut document = String::new();
    {
        let canvas = SVGBackend::with_string(&mut document, (size.0 as u32, size.1 as u32))
            .into_drawing_area();
        canvas.fill(&WHITE)?;
        let title = style::printable(&map.title);
        let em = style::fitting_em(&title, TITLE_EM, WIDTH - 2 * MARGIN)?;
        let middle = (WIDTH / 2, TITLE_HEIGHT / 2);
        canvas.draw(&Text::new(title, middle, style::text(em, HPos::Center)))?;
        legend(&canvas, &marks, TITLE_HEIGHT + LEGEND_HEIGHT / 2)?;

        let bar = Axis::new(shown, true, TICKS);
        let bar_left = draw_bar(&canvas, &bar, &map.value_label, top..top + rows_height)?;
        let (area, _) = canvas.split_vertically(size.1 - MARGIN / 2);
        let (area, _) = area.split_horizontally(bar_left - MARGIN);
        draw_rows(&area, map, &rows, stretch, (top, row_height))?;
        canvas.present()?;
    }
    Ok(document)
}

fn draw_rows(
    area: &Canvas,
    map: &HeatMap,
    rows: &[Vec<Cell>],
    stretch: usize,
    (top, row_height): (i32, i32),
) -> anyhow::Result<()> {
    let every = (ROW_HEIGHT - 3) / row_height + 1;
    let name = |(at, (name, _)): (usize, &(String, _))| match at as i32 % every {
        0 => style::printable(name),
        _ => String::new(),
    };
    // The first at the top, where an axis ends.
    let mut names: Vec<String> = map.rows.iter().enumerate().map(name).collect();
    names.reverse();
    let mut widest = 0;
    for name in &names {
        widest = widest.max(style::text_width(name, TICK_EM)?);
    }
    let labels_width = (widest + 30).min(WIDTH / 2);
    let ends = [map.x.first(), map.x.last()].map(|end| end.copied().unwrap_or(0.0));
    let x = Axis::new(ends[0] - 0.5..ends[1] + 0.5, false, TICKS);
    let x_label = match stretch {
        1 => map.x_label.clone(),
        _ => format!("{} (the largest of {stretch} in each column)", map.x_label),
    };
    let mut chart = ChartBuilder::on(area)
        .margin_left(MARGIN / 2)
        .margin_top(top)
        .x_label_area_size(X_LABELS_HEIGHT)
        .y_label_area_size(labels_width)
        .build_cartesian_2d(x, Axis::named(&names))?;
    chart
        .configure_mesh()
        .disable_mesh()
        .axis_style(style::INK.stroke_width(3))
        .set_all_tick_mark_size(8)
        .label_style(style::text(TICK_EM, HPos::Center))
        .axis_desc_style(style::text(TEXT_EM, HPos::Center))
        .x_desc(style::printable(&x_label))
        .draw()?;
    let at = |px: f64, row: f64| chart.backend_coord(&(px, rows.len() as f64 - 0.5 - row));
    let edge = |column: usize| ends[0] - 0.5 + (column * stretch).min(map.x.len()) as f64;
    for (row, cells) in rows.iter().enumerate() {
        let mut column = 0;
        for same in cells.chunk_by(|a, b| a == b) {
            let end = column + same.len();
            let corners = [
                at(edge(column), row as f64),
                at(edge(end), (row + 1) as f64),
            ];
            draw_cells(area, corners, same[0])?;
            column = end;
        }
    }
    Ok(())
}

/// Cells side by side that look the same. Missing ones are struck through, to be told from a value.
fn draw_cells(canvas: &Canvas, [from, to]: [Pixel; 2], cell: Cell) -> anyhow::Result<()> {
    canvas.draw(&Rectangle::new([from, to], cell.color().filled()))?;
    if cell == Cell::Missing {
        let middle = i32::midpoint(from.1, to.1);
        let line = vec![(from.0, middle), (to.0, middle)];
        canvas.draw(&PathElement::new(line, style::INK.stroke_width(2)))?;
    }
    Ok(())
}

/// The colour bar at the right edge; returns where it begins.
fn draw_bar(canvas: &Canvas, bar: &Axis, label: &str, rows: Range<i32>) -> anyhow::Result<i32> {
    let mut widest = 0;
    for tick in &bar.ticks {
        widest = widest.max(style::text_width(&bar.label(*tick), TICK_EM)?);
    }
    let label_x = WIDTH - MARGIN - 16;
    let left = label_x - 34 - widest - 22 - BAR_WIDTH;
    let height = f64::from(rows.end - rows.start);
    let y = |share: f64| rows.end - (share * height).round() as i32;
    for shade in 0..SHADES {
        let share = |shade: u8| f64::from(shade) / f64::from(SHADES);
        let corners = [
            (left, y(share(shade + 1))),
            (left + BAR_WIDTH, y(share(shade))),
        ];
        canvas.draw(&Rectangle::new(
            corners,
            Cell::Shade(shade).color().filled(),
        ))?;
    }
    for tick in &bar.ticks {
        let at = y((tick - bar.shown.start) / (bar.shown.end - bar.shown.start));
        let mark = vec![(left + BAR_WIDTH, at), (left + BAR_WIDTH + 8, at)];
        canvas.draw(&PathElement::new(mark, style::INK.stroke_width(3)))?;
        let place = (left + BAR_WIDTH + 18, at);
        let text = style::text(TICK_EM, HPos::Left);
        canvas.draw(&Text::new(bar.label(*tick), place, text))?;
    }
    let label = style::printable(label);
    let em = style::fitting_em(&label, TEXT_EM, rows.end - rows.start)?;
    let upright = style::text(em, HPos::Center)
        .transform(FontTransform::Rotate270)
        .pos(Pos::new(HPos::Center, VPos::Center));
    canvas.draw(&Text::new(
        label,
        (label_x, i32::midpoint(rows.start, rows.end)),
        upright,
    ))?;
    Ok(left)
}

/// What the cells mean that the colour bar doesn't have.
fn legend(canvas: &Canvas, marks: &[Cell], y: i32) -> anyhow::Result<()> {
    let mut x = MARGIN;
    for cell in marks {
        let meaning = cell.meaning();
        let corners = [(x, y - 14), (x + 60, y + 14)];
        draw_cells(canvas, corners, *cell)?;
        canvas.draw(&Rectangle::new(corners, style::INK.stroke_width(2)))?;
        let text = style::text(TEXT_EM, HPos::Left);
        canvas.draw(&Text::new(meaning, (x + 78, y), text))?;
        x += 78 + style::text_width(meaning, TEXT_EM)? + 56;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_shows_what_counts_most() {
        let shown = 0.0..3.0; // 1 to 1000
        let of = |values: &[Option<f64>], stretch| cells(values, stretch, &shown);
        let values = [
            Some(1.0),
            Some(1000.0),
            Some(1e-9),
            Some(1e9),
            Some(0.0),
            None,
            Some(f64::NAN),
            Some(f64::INFINITY),
        ];
        let (low, high) = (Cell::Shade(0), Cell::Shade(SHADES - 1));
        let bad = Cell::NonFinite;
        let each = [low, high, low, high, Cell::Zero, Cell::Missing, bad, bad];
        assert_eq!(of(&values, 1), each);
        assert_eq!(of(&values, 3), [high, high, bad]);
        assert_eq!(
            of(&[None, None, None, Some(0.0)], 2),
            [Cell::Missing, Cell::Zero]
        );
        assert_eq!(of(&[], 1), []);
    }
}
