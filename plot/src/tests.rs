use super::*;

/// The SVG of a picture that is written into its own folder.
fn drawn(write: impl FnOnce(&Path) -> anyhow::Result<()>) -> String {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("lr-0.1")).unwrap();
    let files = fs::read_dir(&dir).unwrap();
    assert_eq!(files.count(), 1, "and nothing unfinished");
    fs::read_to_string(dir.path().join("lr-0.1.svg")).unwrap()
}

fn chart(series: Vec<Series>, x_log: bool, y_log: bool) -> Chart {
    let panel = Panel {
        title: "norm:1.0 & more".into(),
        x_label: "step".into(),
        y_label: "loss".into(),
        x_log,
        y_log,
        series,
        horizontal: vec![("persistence".into(), 0.194)],
        ..Panel::default()
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

#[test]
fn a_chart_shows_texts_legend_lines_and_divergence() {
    let mut both = [
        line("none", 0, &[(0.0, 1.0), (10.0, 0.5)]),
        line("clipped", 8, &[(0.0, 1.0), (10.0, 0.1)]),
    ];
    both[0].nan_at = vec![10.0, f64::NAN];
    let mut chart = chart(both.to_vec(), false, true);
    let svg = drawn(|stem| line_chart(&chart, stem));
    let texts = "A &lt;title&gt; &amp; more|norm:1.0 &amp; more|step|loss|none|clipped|persistence|0.1|diverged (NaN)";
    for text in texts.split('|') {
        assert!(svg.contains(&format!("\n{text}\n")), "{text}: {svg}");
    }
    for colour in ["#0072B2", "#D55E00"] {
        assert!(
            svg.contains(&format!(
                "<polyline fill=\"none\" opacity=\"1\" stroke=\"{colour}\""
            )),
            "{colour}: {svg}"
        );
    }
    chart.panels[0].x_names = vec!["one tensor".into(), "many".into()];
    chart.panels[0].series[0].nan_at.clear();
    let svg = draw::svg(&chart).unwrap();
    assert!(svg.contains("one tensor") && !svg.contains("NaN"));
}

#[test]
fn any_data_is_drawn_or_left_out_without_a_panic() {
    let odd = [
        f64::NAN,
        f64::INFINITY,
        0.0,
        -1.0,
        5e-324,
        f64::MAX,
        f64::MIN,
        1.0,
        1e-4,
    ];
    let crossed = odd.iter().flat_map(|x| odd.iter().map(|y| (*x, *y)));
    let crossed: Vec<_> = crossed.collect();
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
            let levels = points.iter().map(|p| ("level".into(), p.1));
            spec.panels[0].horizontal.extend(levels);
            draw::svg(&spec).unwrap();
        }
    }
    draw::svg(&Chart::default()).unwrap();
    let panels = vec![Panel::default(); 9];
    let title = String::new();
    draw::svg(&Chart { title, panels }).unwrap();
}

#[test]
fn a_heat_map_has_names_a_scale_and_marks() {
    let odd = [
        None,
        Some(f64::NAN),
        Some(-1.0),
        Some(5e-324),
        Some(f64::MAX),
        Some(1.0),
    ];
    for (columns, names) in [(0, 0), (1, 1), (7, 39), (2000, 39), (7, 1000)] {
        let row = |at: usize| {
            let value = |column: usize| odd[(column + at) % odd.len()];
            (format!("v\u{0}ar.{at}"), (0..columns).map(value).collect())
        };
        let map = HeatMap {
            title: "Norms".into(),
            value_label: "norm".into(),
            x: (0..columns).map(|x| x as f64).collect(),
            rows: (0..names).map(row).collect(),
            ..HeatMap::default()
        };
        let svg = heat::svg(&map).unwrap();
        assert!(svg.contains("\nnorm\n"));
        if columns == 7 && names == 39 {
            let svg = drawn(|stem| heat_map(&map, stem));
            assert!(svg.contains("\nvar.38\n") && svg.contains("NaN or infinite"));
            let cells = |colour: &str| svg.matches(&format!("fill=\"{colour}\"")).count();
            assert!(cells("#C8C8C8") > 1 && cells("#DC0000") > 1, "{svg}");
        }
    }
}

#[test]
fn a_picture_that_cannot_be_written_leaves_nothing_unfinished() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("chart.svg")).unwrap();
    let error = line_chart(&Chart::default(), &dir.path().join("chart"));
    assert!(error.unwrap_err().to_string().contains("chart.svg"));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}
