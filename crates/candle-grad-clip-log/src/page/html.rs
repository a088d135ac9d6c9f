//! A page as one HTML file.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Page;

const TEMPLATE: &str = include_str!("template.html");
const STYLE: &str = include_str!("page.css");
/// Apache `ECharts` 6.1.0, with its license comment. It has no closing script tag in it.
const CHARTS: &str = include_str!("vendor/echarts.min.js");
/// Goes wherever the library goes.
const NOTICE: &str = include_str!("vendor/NOTICE-echarts");
/// The page's own script, in the order in which the files build on each other.
const SCRIPTS: [&str; 6] = [
    include_str!("script/base.js"),
    include_str!("script/lines.js"),
    include_str!("script/pointer.js"),
    include_str!("script/heat.js"),
    include_str!("script/parts.js"),
    include_str!("script/page.js"),
];

impl Page {
    /// The page as an HTML document that needs nothing else: no server, no network.
    ///
    /// Numbers in charts have six digits. Texts are shown as they are, whatever they hold.
    ///
    /// ```
    /// use candle_grad_clip_log::page::{Mark, Page, Section};
    ///
    /// let text = "All gradients arrive.".to_string();
    /// let page = Page {
    ///     title: "A run".to_string(),
    ///     sections: vec![Section::Text { text, mark: Mark::Good }],
    ///     ..Page::default()
    /// };
    /// assert!(page.to_html().contains("<title>A run</title>"));
    /// ```
    #[must_use]
    pub fn to_html(&self) -> String {
        // Strings, numbers and lists with text keys always have a JSON form.
        let json = serde_json::to_string(self).unwrap_or_else(|_| "{}".to_string());
        let scripts = SCRIPTS.join("\n");
        let mut html = String::with_capacity(CHARTS.len() + json.len() + 64 * 1024);
        let mut rest = TEMPLATE;
        // Once through the template, so that a title that looks like a place stays a title.
        while let Some((before, after)) = rest.split_once("{{") {
            let (place, after) = after.split_once("}}").unwrap_or(("", after));
            html.push_str(before);
            match place {
                "title" => html.push_str(&escape_text(&self.title)),
                "style" => html.push_str(STYLE),
                "data" => push_script_safe(&mut html, &json),
                "notice" => html.push_str(NOTICE),
                "charts" => html.push_str(CHARTS),
                "script" => html.push_str(&scripts),
                _ => {}
            }
            rest = after;
        }
        html.push_str(rest);
        html
    }

    /// Writes the page to `path`, complete or not at all: who reads it meanwhile sees the old page
    /// or the new one.
    ///
    /// # Errors
    /// When the file cannot be written. The old one stays then.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let Some(name) = path.file_name() else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("expected the path of a file, got {}", path.display()),
            ));
        };
        // Of its own for each write, as several runs may write one page.
        let mut unfinished = OsString::from(".");
        unfinished.push(name);
        let count = WRITES.fetch_add(1, Ordering::Relaxed);
        unfinished.push(format!(".{}-{count}.tmp", process::id()));
        let unfinished = path.with_file_name(unfinished);
        let written =
            fs::write(&unfinished, self.to_html()).and_then(|()| fs::rename(&unfinished, path));
        if written.is_err() {
            // The error that counts is the one of writing.
            let _ = fs::remove_file(&unfinished);
        }
        written
    }
}

fn escape_text(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Appends JSON so that nothing in it ends a script element or a line of a script. In JSON these
/// characters are in strings only, where an escape means the same.
fn push_script_safe(html: &mut String, json: &str) {
    for character in json.chars() {
        match character {
            '<' => html.push_str("\\u003c"),
            '>' => html.push_str("\\u003e"),
            '&' => html.push_str("\\u0026"),
            '\u{2028}' => html.push_str("\\u2028"),
            '\u{2029}' => html.push_str("\\u2029"),
            _ => html.push(character),
        }
    }
}
