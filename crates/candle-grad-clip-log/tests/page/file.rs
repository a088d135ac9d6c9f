//! The file: safe whatever the names hold, small, written as a whole.

use std::fs;

use candle_grad_clip_log::page::{Line, LineChart, Mark, Page, Panel, Section};

use crate::demo;

fn data(html: &str) -> &str {
    let start = "id=\"data\">";
    let (_, rest) = html.split_once(start).unwrap();
    rest.split_once("</script>").unwrap().0
}

#[test]
fn texts_cannot_leave_their_place() {
    let text = "</script><script>alert(1)</script><!-- & \u{2028}\u{2029} {{data}}".to_string();
    let page = Page {
        title: text.clone(),
        sections: vec![Section::Text {
            text: text.clone(),
            mark: Mark::None,
        }],
        ..Page::default()
    };
    let html = page.to_html();
    assert!(!html.contains("alert(1)</script>"));
    // The four of the template: none is in a name, the data or the chart library.
    assert_eq!(html.to_lowercase().matches("</script").count(), 4);
    assert!(html.contains("<title>&lt;/script&gt;"));
    let json = data(&html);
    assert!(!json.contains(['<', '>', '&', '\u{2028}', '\u{2029}']));
    let read: serde_json::Value = serde_json::from_str(json).unwrap();
    assert_eq!(read["title"], text);
    assert_eq!(read["sections"][0]["text"], text);
    // A title that looks like a place of the template stays a title.
    assert_eq!(html.matches("\"sections\":").count(), 1);
}

#[test]
fn numbers_are_short_and_never_lost() {
    let points = vec![
        (123_456_789.0, 0.123_456_789),
        (123_456_790.0, f64::NAN),
        (123_456_790.5, f64::INFINITY),
        (f64::NAN, f64::NEG_INFINITY),
        (1e300, 1e-300),
        (2e300, 3.0),
    ];
    let line = Line {
        points,
        ..Line::default()
    };
    let panel = Panel {
        lines: vec![line],
        levels: vec![("limit".to_string(), f64::INFINITY)],
        ..Panel::default()
    };
    let chart = LineChart {
        panels: vec![panel],
        ..LineChart::default()
    };
    let page = Page {
        sections: vec![Section::LineChart(chart)],
        ..Page::default()
    };
    let html = page.to_html();
    let points = "[123456789,0.123457,123456790,\"nan\",123456790.5,\"inf\",null,\"-inf\",\
                  1e+300,1e-300,2e+300,3]";
    assert!(data(&html).contains(points), "{}", data(&html));
    assert!(data(&html).contains("[\"limit\",\"inf\"]"));
}

#[test]
fn a_long_run_stays_below_five_megabytes() {
    let html = demo::page(100_000, 100, 400).to_html();
    println!("{} bytes", html.len());
    assert!(html.len() < 5_000_000, "{} bytes", html.len());
    assert!(html.contains("Licensed to the Apache Software Foundation"));
}

#[test]
fn is_written_as_a_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.html");
    let page = demo::page(100, 3, 3);
    page.write(&path).unwrap();
    page.write(&path).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), page.to_html());
    // A folder is in the way.
    let taken = folder.path().join("taken");
    fs::create_dir(&taken).unwrap();
    assert!(page.write(&taken).is_err());
    assert!(
        page.write(&folder.path().join("none").join("index.html"))
            .is_err()
    );
    assert!(page.write(&folder.path().join("..")).is_err());
    let mut left: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|at| at.unwrap())
        .collect();
    left.sort_by_key(fs::DirEntry::file_name);
    let names: Vec<_> = left.iter().map(fs::DirEntry::file_name).collect();
    assert_eq!(names, ["index.html", "taken"]);
}

/// For a person to look at: `PAGE=/tmp/page.html cargo test --test page -- --ignored look`.
#[test]
#[ignore = "writes a page to look at"]
fn look() {
    let path = std::env::var("PAGE").unwrap();
    let mut page = demo::page(100_000, 60, 400);
    if let Ok(seconds) = std::env::var("REFRESH") {
        let seconds = seconds.parse().unwrap();
        page.refresh = Some(candle_grad_clip_log::page::Refresh { seconds });
    }
    page.write(path.as_ref()).unwrap();
}
