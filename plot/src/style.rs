//! Sizes, colours, fonts, strokes and markers.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::raster;

/// What is drawn on, in pixels from its top left corner.
pub(super) type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// A place on the canvas.
pub(super) type Pixel = (i32, i32);

// In pixels of a picture that pages show at half its width: plotters knows whole pixels only, so the
// canvas is large enough that their rounding does not show.
pub(super) const WIDTH: i32 = 1920;
pub(super) const MARGIN: i32 = 30;
pub(super) const LINE: u32 = 5;
pub(super) const THIN_LINE: u32 = 2;
pub(super) const TITLE_EM: f64 = 40.0;
pub(super) const TEXT_EM: f64 = 30.0;
pub(super) const TICK_EM: f64 = 27.0;
/// Half the size of the cross of a run that became NaN.
pub(super) const CROSS: i32 = 12;
/// How far apart crosses are stacked.
pub(super) const CROSS_HEIGHT: i32 = 2 * CROSS + 8;
const MARKER: i32 = 10;

pub(super) const INK: RGBColor = RGBColor(40, 40, 40);
pub(super) const GRID: RGBColor = RGBColor(215, 215, 215);
pub(super) const FAINT_GRID: RGBColor = RGBColor(238, 238, 238);

/// As many lines have a colour of their own; the next as many have hollow markers.
pub(super) const COLORS: usize = 7;

/// Okabe and Ito's colours for colour-blind readers (2008), without yellow, which is lost on white.
const PALETTE: [RGBColor; COLORS] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];
/// Dash and gap of named levels, by their order.
const LEVEL_DASHES: [(i32, i32); 3] = [(28, 12), (7, 10), (16, 22)];

/// Verdana is its near twin: it serves readers of the SVG who lack it.
const FONT: &str = "DejaVu Sans, Verdana, sans-serif";
/// plotters divides font sizes by this to get an em.
const EM: f64 = 1.24;

/// Makes the compiled-in font known to plotters, which measures text with it.
pub(super) fn load_font() -> anyhow::Result<()> {
    register_font(FONT, FontStyle::Normal, raster::font())
        .map_err(|_| anyhow!("the compiled-in font cannot be read"))
}

/// Text of a size, anchored at its left, centre or right, and vertically at its middle.
pub(super) fn text(em: f64, anchor: HPos) -> TextStyle<'static> {
    (FONT, em * EM)
        .into_font()
        .color(&INK)
        .pos(Pos::new(anchor, VPos::Center))
}

/// The width of a text in pixels.
pub(super) fn text_width(content: &str, em: f64) -> anyhow::Result<i32> {
    let ((left, _), (right, _)) = text(em, HPos::Left).font.layout_box(content)?;
    Ok(right - left)
}

/// The largest size up to `em` at which `content` is no wider than `width`.
pub(super) fn fitting_em(content: &str, em: f64, width: i32) -> anyhow::Result<f64> {
    let needed = text_width(content, em)?;
    Ok(em * (f64::from(width) / f64::from(needed.max(1))).min(1.0))
}

/// What an SVG may hold of a text.
pub(super) fn printable(content: &str) -> String {
    content
        .chars()
        .filter(|c| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}'))
        .collect()
}

pub(super) fn color(index: usize) -> RGBColor {
    PALETTE[index % PALETTE.len()]
}

/// A line through pixels; a single one is a dot.
pub(super) fn stroke(
    canvas: &Canvas,
    path: &[Pixel],
    dash: Option<(i32, i32)>,
    style: ShapeStyle,
) -> anyhow::Result<()> {
    match (path, dash) {
        ([dot], _) => canvas.draw(&Circle::new(*dot, style.stroke_width, style.filled()))?,
        (_, None) => canvas.draw(&PathElement::new(path.to_vec(), style))?,
        (_, Some((dash, gap))) => {
            canvas.draw(&DashedPathElement::new(
                path.iter().copied(),
                dash,
                gap,
                style,
            ))?;
        }
    }
    Ok(())
}

/// Dash and gap of a dashed series.
pub(super) const SERIES_DASH: (i32, i32) = (18, 12);

/// The line of a named level.
pub(super) fn level(canvas: &Canvas, path: [Pixel; 2], index: usize) -> anyhow::Result<()> {
    let dash = LEVEL_DASHES[index % LEVEL_DASHES.len()];
    stroke(
        canvas,
        &path,
        Some(dash),
        INK.mix(0.75).stroke_width(LINE - 1),
    )
}

/// A series' marker: its shape tells lines apart where colours do not, and past the last colour it is hollow.
pub(super) fn marker(canvas: &Canvas, (x, y): Pixel, index: usize) -> anyhow::Result<()> {
    let r = MARKER;
    let offsets: &[Pixel] = match index % PALETTE.len() {
        0 => &[],
        1 => &[
            (-r + 1, -r + 1),
            (r - 1, -r + 1),
            (r - 1, r - 1),
            (-r + 1, r - 1),
        ],
        2 => &[(0, -r - 2), (r + 1, r - 2), (-r - 1, r - 2)],
        3 => &[(0, -r - 3), (r + 3, 0), (0, r + 3), (-r - 3, 0)],
        4 => &[(0, r + 2), (r + 1, -r + 2), (-r - 1, -r + 2)],
        5 => &[(r + 2, 0), (-r + 2, r + 1), (-r + 2, -r - 1)],
        _ => &[(-r - 2, 0), (r - 2, r + 1), (r - 2, -r - 1)],
    };
    let corners = |grown: i32| {
        let corner =
            |(dx, dy): &Pixel| (x + dx + grown * dx.signum(), y + dy + grown * dy.signum());
        offsets.iter().map(corner).collect::<Vec<_>>()
    };
    let fill = |grown: i32, color: RGBColor| match offsets {
        [] => canvas.draw(&Circle::new((x, y), r + grown, color.filled())),
        _ => canvas.draw(&Polygon::new(corners(grown), color.filled())),
    };
    if index / PALETTE.len() % 2 == 0 {
        fill(0, color(index))?;
    } else {
        fill(2, color(index))?;
        fill(-3, WHITE)?;
    }
    Ok(())
}

/// The cross of a run that became NaN.
pub(super) fn cross(canvas: &Canvas, (x, y): Pixel, color: RGBColor) -> anyhow::Result<()> {
    let style = color.stroke_width(LINE + 1);
    for slope in [1, -1] {
        let ends = vec![
            (x - CROSS, y - slope * CROSS),
            (x + CROSS, y + slope * CROSS),
        ];
        canvas.draw(&PathElement::new(ends, style))?;
    }
    Ok(())
}
