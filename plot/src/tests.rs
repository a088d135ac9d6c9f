use resvg::tiny_skia::{Pixmap, PremultipliedColorU8};

use super::*;

/// Draws into a folder of its own and returns the SVG's text and the PNG's pixels.
fn drawn(chart: &Chart) -> (String, Pixmap) {
    let dir = tempfile::tempdir().unwrap();
    line_chart(chart, &dir.path().join("lr-0.1")).unwrap();
    let mut files: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .collect();
    files.sort();
    assert_eq!(
        files,
        ["lr-0.1.png", "lr-0.1.svg"],
        "and nothing unfinished"
    );
    let svg = fs::read_to_string(dir.path().join("lr-0.1.svg")).unwrap();
    (
        svg,
        Pixmap::load_png(dir.path().join("lr-0.1.png")).unwrap(),
    )
}

fn chart(series: Vec<Series>, x_log: bool, y_log: bool) -> Chart {
    let panel = Panel {
        title: String::new(),
        x_label: "step".into(),
        y_label: "loss".into(),
        x_names: Vec::new(),
        x_log,
        y_log,
        series,
        horizontal: vec![("persistence".into(), 0.194)],
    };
    Chart {
        title: "A <title> & more".into(),
        panels: vec![panel],
    }
}

fn line(name: &str, color_index: usize, points: &[(f64, f64)]) -> Series {
    Series {
        name: name.into(),
        points: points.to_vec(),
        color_index,
        ..Series::default()
    }
}

fn count(picture: &Pixmap, red: u8, green: u8, blue: u8) -> usize {
    let wanted = PremultipliedColorU8::from_rgba(red, green, blue, 255).unwrap();
    picture
        .pixels()
        .iter()
        .filter(|pixel| **pixel == wanted)
        .count()
}

#[test]
fn shows_title_labels_legend_and_lines() {
    let both = [
        line("none", 0, &[(0.0, 1.0), (10.0, 0.5)]),
        line("norm:1.0", 1, &[(0.0, 1.0), (10.0, 0.1)]),
    ];
    let (svg, png) = drawn(&chart(both.to_vec(), false, true));
    for text in [
        "A &lt;title&gt; &amp; more",
        "step",
        "loss",
        "none",
        "norm:1.0",
        "persistence",
        "0.1",
    ] {
        assert!(
            svg.contains(&format!("\n{text}\n")) || svg.contains(&format!(">{text}")),
            "{text}: {svg}"
        );
    }
    assert!(!svg.contains("NaN"));
    assert_eq!(png.width(), 1920);
    assert!(count(&png, 0, 114, 178) > 2000 && count(&png, 213, 94, 0) > 2000);
}

#[test]
fn text_is_drawn_without_any_system_font() {
    let untitled = Chart {
        title: String::new(),
        ..chart(vec![], false, false)
    };
    let titled = Chart {
        title: "MMMMMMMM".into(),
        ..untitled.clone()
    };
    let dark = |chart: &Chart| count(&drawn(chart).1, 40, 40, 40);
    assert!(dark(&titled) > dark(&untitled) + 500);
}

#[test]
fn divergence_is_marked_in_the_series_color_and_explained() {
    let quiet = line("none", 0, &[]);
    let diverged = Series {
        nan_at: vec![30.0, f64::NAN],
        ..quiet.clone()
    };
    let (before, _) = drawn(&chart(vec![quiet], false, true));
    let (after, _) = drawn(&chart(vec![diverged], false, true));
    let strokes = |svg: &str| svg.matches("stroke=\"#0072B2\"").count();
    assert!(after.contains("diverged (NaN)") && !before.contains("diverged (NaN)"));
    assert_eq!(
        strokes(&after),
        strokes(&before) + 2,
        "one cross of two strokes"
    );
}

#[test]
fn series_that_diverge_together_have_crosses_apart() {
    let at = |index| Series {
        nan_at: vec![3e-3],
        ..line("x", index, &[])
    };
    let (svg, _) = drawn(&chart(vec![at(0), at(1)], true, true));
    let points = |color: &str| -> Vec<String> {
        svg.lines()
            .filter(|l| l.contains("stroke-width=\"6\"") && l.contains(color))
            .map(|l| l.split("points=\"").nth(1).unwrap().to_owned())
            .collect()
    };
    assert_eq!(points("#0072B2").len(), 2);
    assert_ne!(points("#0072B2"), points("#D55E00"));
}

#[test]
fn any_data_is_drawn_or_left_out_without_a_panic() {
    let odd = [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        0.0,
        -1.0,
        5e-324,
        f64::MAX,
        f64::MIN,
        1.0,
        1e-4,
    ];
    let crossed: Vec<_> = odd
        .iter()
        .flat_map(|x| odd.iter().map(|y| (*x, *y)))
        .collect();
    let mut cases: Vec<Vec<(f64, f64)>> = crossed.iter().map(|point| vec![*point]).collect();
    cases.extend([vec![], crossed, vec![(1.0, 2.0); 50]]);
    for points in cases {
        for (x_log, y_log) in [(false, false), (true, true), (false, true)] {
            let series = Series {
                faint: vec![points.clone(), vec![]],
                nan_at: points.iter().map(|p| p.0).collect(),
                dashed: true,
                ..line("odd \u{0} name", usize::MAX, &points)
            };
            let mut spec = chart(vec![series, Series::default()], x_log, y_log);
            spec.panels[0]
                .horizontal
                .extend(points.iter().map(|p| ("level".into(), p.1)));
            draw::svg(&spec).unwrap();
        }
    }
    drawn(&Chart::default());
    drawn(&Chart {
        panels: vec![Panel::default(), Panel::default()],
        ..Chart::default()
    });
}

#[test]
fn a_directory_that_does_not_exist_is_an_error_that_names_the_file() {
    let stem = tempfile::tempdir()
        .unwrap()
        .path()
        .join("missing")
        .join("loss");
    let message = line_chart(&Chart::default(), &stem)
        .unwrap_err()
        .to_string();
    assert!(message.contains("loss.svg"), "{message}");
}

#[test]
fn named_places_stand_where_numbers_would() {
    let points = [(0.0, 1.0), (f64::NAN, f64::NAN), (1.0, 10.0)];
    let mut named = chart(vec![line("rival", 0, &points)], false, true);
    named.panels[0].x_names = vec!["one tensor".into(), "many tensors".into()];
    let (svg, _) = drawn(&named);
    assert!(svg.contains("one tensor") && svg.contains("many tensors"));
    assert!(!svg.contains(">0.5<"), "no numbers on the x axis");
}

fn map(rows: Vec<(String, Vec<Option<f64>>)>) -> HeatMap {
    HeatMap {
        title: "Norms <by> step".into(),
        x_label: "step".into(),
        value_label: "norm".into(),
        x: (1..=rows[0].1.len()).map(|x| x as f64).collect(),
        rows,
    }
}

/// The pixels of a heat map, drawn into a folder of its own, and its SVG.
fn heated(map: &HeatMap) -> (String, Pixmap) {
    let dir = tempfile::tempdir().unwrap();
    let stem = dir.path().join("norms");
    heat_map(map, &stem).unwrap();
    let svg = fs::read_to_string(dir.path().join("norms.svg")).unwrap();
    let png = Pixmap::load_png(dir.path().join("norms.png")).unwrap();
    (svg, png)
}

#[test]
fn a_heat_map_has_names_a_scale_and_light_for_what_is_large() {
    let rows = vec![
        ("large".into(), vec![Some(100.0); 50]),
        ("small".into(), vec![Some(1.0); 50]),
    ];
    let (svg, png) = heated(&map(rows));
    for text in [
        "Norms &lt;by&gt; step",
        "large",
        "small",
        "step",
        "norm",
        "10",
        "50",
    ] {
        assert!(svg.contains(&format!("\n{text}\n")), "{text}: {svg}");
    }
    for absent in ["missing", "NaN", "zero"] {
        assert!(!svg.contains(absent), "{absent}");
    }
    // The two colours that most of the picture has, beside white and the grid.
    let mut colors: Vec<(usize, [u8; 3])> = Vec::new();
    for pixel in png.pixels() {
        let color = [pixel.red(), pixel.green(), pixel.blue()];
        match colors.iter_mut().find(|(_, other)| *other == color) {
            Some((count, _)) => *count += 1,
            None => colors.push((1, color)),
        }
    }
    colors.sort_unstable();
    let [.., second, first, (_, [255, 255, 255])] = colors[..] else {
        panic!("{colors:?}");
    };
    assert!(second.0 > 30_000, "{second:?}");
    let (light, dark) = if first.1[1] > second.1[1] {
        (first.1, second.1)
    } else {
        (second.1, first.1)
    };
    assert!(light[0] > 200 && light[1] > 200, "yellow: {light:?}");
    assert!(dark[1] < 60 && dark[2] > 60, "violet: {dark:?}");
    let place = |[red, green, blue]: [u8; 3]| {
        let wanted = PremultipliedColorU8::from_rgba(red, green, blue, 255).unwrap();
        let mut found = png.pixels().chunks(png.width() as usize);
        found.position(|row| row[..1200].contains(&wanted)).unwrap()
    };
    assert!(place(light) < place(dark), "the first row is at the top");
}

#[test]
fn missing_zero_and_non_finite_cells_are_marked() {
    let values = [None, Some(0.0), Some(f64::NAN), Some(1.0)];
    let rows = vec![
        ("w".into(), values.to_vec()),
        ("v".into(), vec![Some(2.0); 4]),
    ];
    let (svg, png) = heated(&map(rows));
    for text in ["missing", "zero", "NaN or infinite"] {
        assert!(svg.contains(&format!("\n{text}\n")), "{text}");
    }
    let (grey, red) = (count(&png, 200, 200, 200), count(&png, 220, 0, 0));
    assert!(grey > 5_000 && red > 5_000, "{grey} {red}");
}

#[test]
fn any_heat_map_is_drawn() {
    let odd = [
        None,
        Some(f64::NAN),
        Some(f64::INFINITY),
        Some(-1.0),
        Some(0.0),
        Some(5e-324),
        Some(f64::MAX),
    ];
    for columns in [0, 1, 7, 2000] {
        for names in [0, 1, 39, 1000] {
            let row = |at: usize| {
                let value = |column: usize| odd[(column + at) % odd.len()];
                (format!("v\u{0}ar.{at}"), (0..columns).map(value).collect())
            };
            heat::svg(&HeatMap {
                x: (0..columns).map(|x| x as f64).collect(),
                rows: (0..names).map(row).collect(),
                ..HeatMap::default()
            })
            .unwrap();
        }
    }
}

#[test]
fn more_lines_than_colours_have_hollow_markers() {
    let points = [(0.0, 1.0), (1.0, 2.0)];
    let of = |index| drawn(&chart(vec![line("x", index, &points)], false, true)).1;
    let white = |picture: &Pixmap| count(picture, 255, 255, 255);
    let blue = |picture: &Pixmap| count(picture, 0, 114, 178);
    for shape in 0..7 {
        let (filled, hollow) = (of(shape), of(shape + 7));
        assert_ne!(filled.data(), hollow.data(), "{shape}");
    }
    // Three markers: two points and the legend's.
    assert!(white(&of(7)) > white(&of(0)) && blue(&of(7)) > 3 * 100);
}

#[test]
fn many_panels_are_lower_each() {
    let one = chart(vec![line("x", 0, &[(0.0, 1.0), (1.0, 1e6)])], false, true);
    let height = |panels: usize| {
        let panels = vec![one.panels[0].clone(); panels];
        let chart = Chart {
            panels,
            ..one.clone()
        };
        drawn(&chart).1.height()
    };
    assert_eq!(height(4) - height(3), 700);
    assert_eq!(height(7), height(4), "they share the room of four");
    assert_eq!(height(12) - height(11), 400);
}

#[test]
fn a_panel_may_have_a_title() {
    let untitled = chart(vec![line("x", 0, &[(0.0, 1.0), (1.0, 2.0)])], false, false);
    let mut titled = untitled.clone();
    titled.panels[0].title = "norm:1.0 & more".into();
    let ((with, _), (without, _)) = (drawn(&titled), drawn(&untitled));
    assert!(with.contains("\nnorm:1.0 &amp; more\n") && !without.contains("norm:1.0"));
}

#[test]
fn a_picture_that_cannot_be_written_leaves_nothing_unfinished() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("chart.svg")).unwrap();
    let error = line_chart(&chart(Vec::new(), false, false), &dir.path().join("chart"));
    assert!(error.unwrap_err().to_string().contains("chart.svg"));
    let mut left: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|file| file.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["chart.png", "chart.svg"], "the other one is there");
}
