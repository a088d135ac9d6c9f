//! Sizes, colours, fonts and markers.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// What is drawn on, in pixels from its top left corner.
pub(super) type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;

// In pixels of a picture that pages show at half its width: plotters knows whole pixels only, so
// the canvas is large enough that their rounding does not show.
pub(super) const WIDTH: i32 = 1920;
pub(super) const MARGIN: i32 = 30;
pub(super) const TITLE_HEIGHT: i32 = 84;
/// Under an x axis: ticks, labels and what it shows.
pub(super) const X_LABELS_HEIGHT: i32 = 96;
pub(super) const LINE: u32 = 5;
pub(super) const TITLE_EM: f64 = 40.0;
pub(super) const TEXT_EM: f64 = 30.0;
pub(super) const TICK_EM: f64 = 27.0;
/// Half the size of the cross of a run that became NaN.
pub(super) const CROSS: i32 = 12;
pub(super) const INK: RGBColor = RGBColor(40, 40, 40);

/// Okabe and Ito's colours for colour-blind readers (2008), without yellow, which is lost on white.
const PALETTE: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];
/// The corners of markers, which tell lines apart where colours do not.
const MARKERS: [&[(i32, i32)]; 7] = [
    &[
        (-4, -10),
        (4, -10),
        (10, -4),
        (10, 4),
        (4, 10),
        (-4, 10),
        (-10, 4),
        (-10, -4),
    ],
    &[(-9, -9), (9, -9), (9, 9), (-9, 9)],
    &[(0, -12), (11, 8), (-11, 8)],
    &[(0, -13), (13, 0), (0, 13), (-13, 0)],
    &[(0, 12), (11, -8), (-11, -8)],
    &[(12, 0), (-8, 11), (-8, -11)],
    &[(-12, 0), (8, 11), (8, -11)],
];

/// Verdana is its near twin: it serves readers of the SVG who lack it.
const FONT: &str = "DejaVu Sans, Verdana, sans-serif";
/// plotters divides font sizes by this to get an em.
const EM: f64 = 1.24;

/// The compiled-in font.
pub(super) fn font() -> &'static [u8] {
    dejavu::sans::regular()
}

/// Makes it known to plotters, which measures text with it.
pub(super) fn load_font() -> anyhow::Result<()> {
    register_font(FONT, FontStyle::Normal, font())
        .map_err(|_| anyhow!("the compiled-in font cannot be read"))
}

/// Text of a size, anchored at its left, centre or right, and vertically at its middle.
pub(super) fn text(em: f64, anchor: HPos) -> TextStyle<'static> {
    let font = (FONT, em * EM).into_font().color(&INK);
    font.pos(Pos::new(anchor, VPos::Center))
}

/// The width of a text in pixels.
pub(super) fn text_width(content: &str, em: f64) -> anyhow::Result<i32> {
    Ok(text(em, HPos::Left).font.box_size(content)?.0.cast_signed())
}

/// The width of the widest.
pub(super) fn widest<T: AsRef<str>>(
    texts: impl Iterator<Item = T>,
    em: f64,
) -> anyhow::Result<i32> {
    texts
        .map(|one| text_width(one.as_ref(), em))
        .try_fold(0, |all, one| Ok(all.max(one?)))
}

/// The largest size up to `em` at which `content` is no wider than `width`.
pub(super) fn fitting_em(content: &str, em: f64, width: i32) -> anyhow::Result<f64> {
    let needed = text_width(content, em)?.max(1);
    Ok(em * (f64::from(width) / f64::from(needed)).min(1.0))
}

/// What an SVG may hold of a text.
pub(super) fn printable(content: &str) -> String {
    let allowed = |c: &char| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}');
    content.chars().filter(allowed).collect()
}

/// Draws what `draw` puts on a white canvas with a title.
pub(super) fn picture(
    title: &str,
    height: i32,
    draw: impl FnOnce(&Canvas) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    load_font()?;
    let mut document = String::new();
    {
        let size = (WIDTH as u32, u32::try_from(height)?);
        let canvas = SVGBackend::with_string(&mut document, size).into_drawing_area();
        canvas.fill(&WHITE)?;
        let title = printable(title);
        let em = fitting_em(&title, TITLE_EM, WIDTH - 2 * MARGIN)?;
        let middle = (WIDTH / 2, TITLE_HEIGHT / 2);
        canvas.draw(&Text::new(title, middle, text(em, HPos::Center)))?;
        draw(&canvas)?;
        canvas.present()?;
    }
    Ok(document)
}

pub(super) fn color(index: usize) -> RGBColor {
    PALETTE[index % PALETTE.len()]
}

/// A series' marker about a place: past the last colour it is hollow.
pub(super) fn marker(index: usize) -> [Polygon<(i32, i32)>; 2] {
    let corners = MARKERS[index % MARKERS.len()];
    let inner = corners.iter().map(|(x, y)| (x * 6 / 10, y * 6 / 10));
    let is_hollow = !(index / PALETTE.len()).is_multiple_of(2);
    let fill = if is_hollow { WHITE } else { color(index) };
    [
        Polygon::new(corners, color(index).filled()),
        Polygon::new(inner.collect::<Vec<_>>(), fill.filled()),
    ]
}

/// The two strokes of the cross of a run that became NaN, this far below a place.
pub(super) fn cross(below: i32, color: RGBColor) -> [PathElement<(i32, i32)>; 2] {
    let style = color.stroke_width(LINE + 1);
    [1, -1].map(|slope| {
        let ends = [
            (-CROSS, below - slope * CROSS),
            (CROSS, below + slope * CROSS),
        ];
        PathElement::new(ends, style)
    })
}
