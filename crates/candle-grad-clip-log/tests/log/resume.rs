//! Going on after a stop or a kill.

use std::fs;
use std::path::Path;

use candle_grad_clip_log::{Error, RunLog, read_metrics, read_scalars};

use crate::made_up::{MadeUp, create, metrics_without_time, quiet, read};

/// Steps 1 to 6 with a scalar after each, of which `kill` leaves what it likes.
fn run_of_six(folder: &Path) -> MadeUp {
    let mut run = MadeUp::new();
    let mut log = create(folder);
    log.describe(&run.opt).unwrap();
    for step in 1..=6u32 {
        run.log(&mut log, [f64::from(step)]);
        log.scalar("loss/test", step.into(), 0.5).unwrap();
    }
    log.finish().unwrap();
    run
}

#[test]
fn a_resumed_run_is_the_run_without_a_stop() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, halves) = (folder.path().join("whole"), folder.path().join("halves"));
    run_of_six(&whole);
    run_of_six(&halves);
    let mut log = quiet(RunLog::resume(&halves, 4).unwrap());
    assert_eq!(metrics_without_time(&halves).len(), 5);
    let mut run = MadeUp::new();
    // An optimizer that was loaded goes on counting.
    (0..4).for_each(|_| _ = run.step(1.0));
    for step in 5..=6u32 {
        run.log(&mut log, [f64::from(step)]);
        log.scalar("loss/test", step.into(), 0.5).unwrap();
    }
    log.finish().unwrap();
    assert_eq!(metrics_without_time(&halves), metrics_without_time(&whole));
    for name in ["scalars.csv", "param_norms.csv"] {
        assert_eq!(read(&halves, name), read(&whole, name), "{name}");
    }
    let info: serde_json::Value = serde_json::from_str(&read(&halves, "run.json")).unwrap();
    assert_eq!(info["starts"][1]["after_step"], 4);
    assert_eq!(info["state"], "finished");
}

#[test]
fn an_optimizer_that_counts_from_1_again_goes_on_after_the_step() {
    let folder = tempfile::tempdir().unwrap();
    run_of_six(folder.path());
    let mut log = quiet(RunLog::resume(folder.path(), 5).unwrap()).with_strict(true);
    MadeUp::new().log(&mut log, [1.0, 1.0]);
    log.finish().unwrap();
    let rows = read_metrics(folder.path().join("metrics.csv")).unwrap();
    let steps: Vec<_> = rows.iter().map(|row| row.step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6, 7]);
}

/// What was flushed before a kill (here: a log that never ends) is there.
#[test]
fn a_flushed_run_has_all_steps_on_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = create(folder.path());
    MadeUp::new().log(&mut log, [1.0, 2.0]);
    log.scalar("x", 2, 3.0).unwrap();
    log.flush().unwrap();
    std::mem::forget(log);
    drop(quiet(RunLog::resume(folder.path(), 2).unwrap()));
    assert_eq!(
        read_metrics(folder.path().join("metrics.csv"))
            .unwrap()
            .len(),
        2
    );
    assert_eq!(
        read_scalars(folder.path().join("scalars.csv"))
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn resume_without_a_run_is_create() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = quiet(RunLog::resume(folder.path().join("new"), 0).unwrap());
    MadeUp::new().log(&mut log, [1.0]);
    log.finish().unwrap();
    assert_eq!(metrics_without_time(&folder.path().join("new")).len(), 2);
}

/// A kill can end a file after any byte: each file is cut after every byte of its last two rows,
/// and in the names of its columns.
#[test]
fn half_records_of_a_kill_are_cut() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run_of_six(folder);
    for name in ["metrics.csv", "scalars.csv", "param_norms.csv"] {
        let path = folder.join(name);
        let whole = fs::read(&path).unwrap();
        let ends: Vec<usize> = (1..=whole.len())
            .filter(|end| whole[end - 1] == b'\n')
            .collect();
        let third_last = ends[ends.len() - 3];
        for end in (0..=ends[0]).chain(third_last..=whole.len()) {
            fs::write(&path, &whole[..end]).unwrap();
            drop(quiet(RunLog::resume(folder, 100).unwrap()));
            let whole_rows = ends.iter().rfind(|at| **at <= end).copied().unwrap_or(0);
            assert_eq!(
                fs::read(&path).unwrap(),
                whole[..whole_rows],
                "{name} to {end}"
            );
        }
        fs::write(&path, &whole).unwrap();
    }
}

/// A file that was cut in its first line gets it again.
#[test]
fn a_run_that_was_killed_at_its_start_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run_of_six(folder);
    for name in ["metrics.csv", "scalars.csv"] {
        let path = folder.join(name);
        let start = fs::read(&path).unwrap();
        fs::write(&path, &start[..9]).unwrap();
    }
    let mut log = quiet(RunLog::resume(folder, 0).unwrap());
    MadeUp::new().log(&mut log, [1.0]);
    log.scalar("x", 1, 2.0).unwrap();
    log.finish().unwrap();
    assert_eq!(read_metrics(folder.join("metrics.csv")).unwrap().len(), 1);
    assert_eq!(read_scalars(folder.join("scalars.csv")).unwrap().len(), 1);
}

#[test]
fn a_damaged_file_is_an_error_that_names_it() {
    for (name, text) in [
        ("metrics.csv", "step,loss\n1,2\n"),
        ("scalars.csv", "step,name,value\n1,a,x\n2,a,1.0\n"),
        ("run.json", "[]"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        run_of_six(folder.path());
        fs::write(folder.path().join(name), text).unwrap();
        let error = RunLog::resume(folder.path(), 3).unwrap_err();
        assert!(matches!(error, Error::NotOurs { .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(read(folder.path(), name), text);
    }
}

#[test]
fn a_step_that_goes_back_is_logged_or_an_error_under_strict() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = MadeUp::new();
    let mut log = create(folder.path());
    let (first, second) = (run.step(1.0), run.step(2.0));
    log.step(&second, None).unwrap();
    log.step(&first, None).unwrap();
    log = log.with_strict(true);
    let message = log.step(&first, None).unwrap_err().to_string();
    assert!(
        message.starts_with("step 1 comes after step 1"),
        "{message}"
    );
    log.finish().unwrap();
    let rows = read_metrics(folder.path().join("metrics.csv")).unwrap();
    assert_eq!(rows.iter().map(|row| row.step).collect::<Vec<_>>(), [2, 1]);
}
