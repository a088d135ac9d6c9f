//! Whose files are replaced, and whose are not.

use std::fs;

use candle_grad_clip_log::page::Section;
use candle_grad_clip_log::{Error, RunLog, compare_runs, runs_sections};

use crate::made_up::{MadeUp, create, names, quiet, read};

#[test]
fn a_folder_with_a_run_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut log = create(folder);
    MadeUp::new().log(&mut log, [1.0, 2.0]);
    log.finish().unwrap();
    let before = read(folder, "metrics.csv");
    let error = RunLog::create(folder).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }));
    let message = error.to_string();
    assert!(message.contains("run.json") && message.contains("RunLog::overwrite"));
    assert_eq!(read(folder, "metrics.csv"), before);

    fs::write(folder.join("notes.txt"), "mine").unwrap();
    let mut log = quiet(RunLog::overwrite(folder).unwrap());
    assert_eq!(names(folder), ["notes.txt", "run.json"]);
    MadeUp::new().log(&mut log, [3.0]);
    log.finish().unwrap();
    assert_eq!(read(folder, "metrics.csv").lines().count(), 2);
}

#[test]
fn files_of_others_are_never_replaced() {
    for name in [
        "index.html",
        "metrics.csv",
        "run.json",
        "events.out.tfevents.1.host",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, "{}").unwrap();
        for log in [
            RunLog::create(folder.path()),
            RunLog::overwrite(folder.path()),
            RunLog::resume(folder.path(), 7),
        ] {
            let message = log.unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "{}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn other_files_in_the_folder_do_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("checkpoints")).unwrap();
    create(folder.path()).finish().unwrap();
    assert_eq!(
        names(folder.path()),
        ["checkpoints", "index.html", "run.json"]
    );
}

#[cfg(unix)]
#[test]
fn a_folder_that_can_not_be_made_is_an_error_that_names_it() {
    let error = RunLog::create("/dev/null/run").unwrap_err();
    assert_eq!(error.to_string(), "cannot create `/dev/null/run`");
}

#[test]
fn runs_of_a_folder_are_laid_over_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (name, scale) in [("b", 1.0), ("a", 4.0)] {
        let mut log = create(&folder.join(name));
        MadeUp::new().log(&mut log, [scale, 2.0 * scale]);
        log.scalar("loss/test", 2, scale).unwrap();
        log.finish().unwrap();
    }
    fs::create_dir(folder.join("empty")).unwrap();
    let sections = runs_sections(folder).unwrap();
    let Section::LineChart(chart) = &sections[1] else {
        panic!("{sections:?}");
    };
    let labels: Vec<_> = chart.panels.iter().map(|panel| &*panel.y_label).collect();
    assert_eq!(labels, ["train loss", "test loss", "norm before clipping"]);
    let line = &chart.panels[2].lines[0];
    assert_eq!(
        (&*line.name, &*line.points),
        ("a", &[(1.0, 20.0), (2.0, 40.0)][..])
    );
    let Section::Table(table) = &sections[2] else {
        panic!("{sections:?}");
    };
    assert_eq!(
        table.rows[0][..6],
        ["a", "2", "8.000", "4.000", "100 %", "0"]
    );
    assert_eq!(table.rows[1][..6], ["b", "2", "2.000", "1.000", "0 %", "0"]);
    let links = ["a", "b"].map(|name| (name.to_owned(), format!("{name}/index.html")));
    assert_eq!(
        sections[4],
        Section::Links {
            links: links.to_vec()
        }
    );

    compare_runs(folder).unwrap();
    compare_runs(folder).unwrap(); // its own page is replaced
    fs::write(folder.join("index.html"), "mine").unwrap();
    let error = compare_runs(folder).unwrap_err();
    assert!(matches!(error, Error::NotOurs { .. }));
    assert_eq!(read(folder, "index.html"), "mine");
}

#[test]
fn a_column_that_no_run_fills_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = create(&folder.path().join("only"));
    MadeUp::new().log(&mut log, [1.0]);
    log.finish().unwrap();
    let sections = runs_sections(folder.path()).unwrap();
    let Section::Table(table) = &sections[2] else {
        panic!("{sections:?}");
    };
    let expected = [
        "run",
        "last step",
        "last train loss",
        "clipped",
        "skipped steps",
        "time",
    ];
    assert_eq!(table.columns, expected);
    assert_eq!(table.rows[0][..4], ["only", "1", "1.000", "0 %"]);
}
