//! What is in the files of a run that ended.

use candle_grad_clip::SkipReason;
use candle_grad_clip_log::{RunLog, read_metrics, read_scalars};

use crate::made_up::{FILES, MadeUp, create, metrics_without_time, names, quiet, read};

#[test]
fn the_csv_files_of_a_run_with_a_skip_a_nan_and_a_missing_gradient() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut run = MadeUp::new();
    let mut log = create(folder);
    log.describe(&run.opt).unwrap();
    let report = run.step(1.0);
    log.step(&report, 0.1 + 0.2).unwrap();
    let report = run.step(f64::INFINITY);
    log.step(&report, f64::NAN).unwrap();
    let report = run.step(4.0);
    log.step(&report, None).unwrap();
    log.scalar("loss/test", 3, f64::INFINITY).unwrap();
    log.scalar("odd, \"name\"", 3, 5e-324).unwrap();
    log.finish().unwrap();

    let expected = [
        "step,loss,total_norm,clipped_norm,clip_coef,limit,was_clipped,skipped,skip_reason,\
         non_finite,missing_grads",
        "1,0.30000000000000004,5.0,5.0,1.0,10.0,0,0,,0,1",
        "2,NaN,inf,0.0,0.0,10.0,0,1,non_finite,2,1",
        "3,,20.0,10.0,0.5,10.0,1,0,,0,1",
    ];
    assert_eq!(metrics_without_time(folder), expected);
    let expected = "step,name,value\n3,loss/test,inf\n3,\"odd, \"\"name\"\"\",5e-324\n";
    assert_eq!(read(folder, "scalars.csv"), expected);
    let expected = "first_step,last_step,name,steps,rms,largest\n\
                    1,1,\"w, first\",1,5.0,5.0\n1,1,b,1,0.0,0.0\n\
                    2,2,\"w, first\",1,inf,inf\n2,2,b,1,0.0,0.0\n\
                    3,3,\"w, first\",1,20.0,20.0\n3,3,b,1,0.0,0.0\n";
    assert_eq!(read(folder, "param_norms.csv"), expected);
    assert_eq!(names(folder), FILES);

    let rows = read_metrics(folder.join("metrics.csv")).unwrap();
    assert_eq!(rows[0].loss, Some(0.1 + 0.2));
    assert!(rows[1].loss.unwrap().is_nan());
    assert_eq!(
        (rows[1].skipped, rows[1].skip_reason),
        (true, Some(SkipReason::NonFinite))
    );
    assert_eq!((rows[2].loss, rows[2].was_clipped), (None, true));
    assert!(rows.is_sorted_by(|a, b| a.seconds <= b.seconds));
    let scalars = read_scalars(folder.join("scalars.csv")).unwrap();
    assert_eq!(
        (&*scalars[1].name, scalars[1].value),
        ("odd, \"name\"", 5e-324)
    );
}

#[test]
fn what_was_run_is_in_run_json() {
    let folder = tempfile::tempdir().unwrap();
    let run = MadeUp::new();
    let mut log = create(folder.path());
    log.describe(&run.opt).unwrap();
    log.config(&[("seed", 42)]).unwrap();
    drop(log);
    let info: serde_json::Value = serde_json::from_str(&read(folder.path(), "run.json")).unwrap();
    assert_eq!(info["state"], "stopped");
    assert_eq!(info["config"], serde_json::json!([["seed", 42]]));
    assert_eq!(info["optimizer"]["clip"], "norm:10,eps=0");
    assert_eq!(info["optimizer"]["learning_rate"], 0.1);
    assert_eq!(info["optimizer"]["device"], "CPU");
    let var = serde_json::json!({"name": "w, first", "shape": [2], "dtype": "f64"});
    assert_eq!(info["optimizer"]["vars"][0], var);
}

#[test]
fn histograms_and_norms_of_vars_go_to_the_event_file_on_demand() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = MadeUp::new();
    let mut log = create(folder.path()).with_param_norm_events(true);
    run.log(&mut log, [1.0]);
    let grads = run.grads(1.0);
    log.histograms(1, run.opt.vars(), &grads).unwrap();
    log.finish().unwrap();
    let events = std::fs::read_dir(folder.path()).unwrap();
    let events = events.map(|entry| entry.unwrap().path());
    let path = events
        .into_iter()
        .find(|path| path.to_string_lossy().contains("tfevents"));
    let bytes = std::fs::read(path.unwrap()).unwrap();
    let has = |tag: &str| bytes.windows(tag.len()).any(|part| part == tag.as_bytes());
    for tag in [
        "loss/train",
        "grad/total_norm",
        "grad/clip_coef",
        "gradients/w, first",
        "gradients/b",
        "grad_norm/w, first",
    ] {
        assert!(has(tag), "{tag}");
    }
    // It has no gradient.
    assert!(!has("gradients/c") && !has("grad_norm/c"));
}

#[test]
fn without_tensorboard_there_is_no_event_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = MadeUp::new().without_param_norms();
    let mut log = create(folder.path()).with_tensorboard(false);
    run.log(&mut log, [1.0]);
    log.finish().unwrap();
    assert_eq!(
        names(folder.path()),
        ["index.html", "metrics.csv", "run.json"]
    );
}

/// Each in its own thread and folder.
#[test]
fn logs_in_several_threads_do_not_mix() {
    let folder = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let folder = folder.path().join(thread.to_string());
            let mut log = quiet(RunLog::create(folder).unwrap());
            scope.spawn(move || {
                MadeUp::new().log(&mut log, (0..50).map(|_| f64::from(thread)));
                log.finish().unwrap();
            });
        }
    });
    for thread in 0..4 {
        let path = folder.path().join(thread.to_string()).join("metrics.csv");
        let rows = read_metrics(path).unwrap();
        assert_eq!(rows.len(), 50);
        assert!(rows.iter().all(|row| row.loss == Some(f64::from(thread))));
    }
}
