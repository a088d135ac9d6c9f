//! PNG from SVG.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use resvg::tiny_skia::{Color, Pixmap, Transform};
use resvg::usvg::{Options, Tree, fontdb::Database};

/// The compiled-in font, under whose name [`super::draw`] writes text.
pub(super) fn font() -> &'static [u8] {
    dejavu::sans::regular()
}

/// Renders an SVG at its own size on white.
pub(super) fn png(svg: &str) -> anyhow::Result<Vec<u8>> {
    let mut fonts = Database::new();
    fonts.load_font_data(font().to_vec());
    let options = Options {
        fontdb: Arc::new(fonts),
        ..Options::default()
    };
    let tree = Tree::from_str(svg, &options).context("cannot read the chart's SVG back")?;
    let size = tree.size().to_int_size();
    let mut pixels = Pixmap::new(size.width(), size.height())
        .ok_or_else(|| anyhow!("no memory for a picture of {size:?} pixels"))?;
    pixels.fill(Color::WHITE);
    resvg::render(&tree, Transform::identity(), &mut pixels.as_mut());
    pixels
        .encode_png()
        .context("cannot encode the chart as PNG")
}
