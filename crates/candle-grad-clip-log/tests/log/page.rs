//! What the page of a run says.

use candle_grad_clip_log::RunLog;

use crate::made_up::{MadeUp, create, quiet, read};

fn assert_has(page: &str, sentences: &[&str]) {
    for sentence in sentences {
        assert!(page.contains(sentence), "`{sentence}` is missing");
    }
}

#[test]
fn a_page_answers_in_the_right_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = MadeUp::new();
    let mut log = create(folder.path());
    log.describe(&run.opt).unwrap();
    log.config(&serde_json::json!({"model": {"layers": 2}, "seed": 42}))
        .unwrap();
    log.total_steps(200);
    run.log(&mut log, (0..120).map(|step| 4.0 - f64::from(step) / 60.0));
    run.log(&mut log, [f64::INFINITY, 1.0]);
    log.scalar("loss/test", 100, 0.75).unwrap();
    log.scalar("accuracy", 100, 0.5).unwrap();
    log.finish().unwrap();

    let page = read(folder.path(), "index.html");
    let headings = [
        "Is it learning?",
        "Is it stable?",
        "Which Vars learn nothing?",
        "Which Vars dominate the norm?",
        "Which limit would suit?",
        "What else was logged?",
        "What was run?",
    ];
    let places: Vec<_> = headings
        .iter()
        .map(|text| page.find(text).unwrap())
        .collect();
    assert!(places.is_sorted(), "{places:?}");
    assert_has(
        &page,
        &[
            "Finished at step 122 of 200, after",
            "The training loss is 1.000 now",
            "The test loss is 0.7500 now; the lowest was 0.7500 at step 100.",
            "98 % of all steps", // 120 of 122 have a norm above 10
            "1 step (0.8 %) was skipped: 1 because gradients were NaN or infinite.",
            "1 step had a norm that is NaN or infinite.",
            "No gradient in any step, so not trained: c.",
            "ops::layer_norm_slow",
            "1 of 122 steps had NaN or infinite gradients, which train no Var.",
            "exactly zero in all of the last 100 steps: b.",
            "w, first has 100 % of the squared norm",
            "The clip of this run is norm:10,eps=0.",
            "model.layers",
            "steps a second",
        ],
    );
    assert!(!page.contains(r#""refresh":{"#), "it is over");
}

#[test]
fn a_page_says_how_to_get_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = MadeUp::new().without_param_norms();
    let mut log = create(folder.path());
    for _ in 0..3 {
        let report = run.step(1.0);
        log.step(&report, None).unwrap();
    }
    drop(log);
    let page = read(folder.path(), "index.html");
    assert_has(
        &page,
        &[
            "Stopped at step 3, after",
            "No loss was logged.",
            "No step was skipped, and all gradients were finite.",
            "Norms by Var were not measured: add `.with_param_norms(true)`",
        ],
    );
}

#[test]
fn a_running_page_reloads_and_a_run_without_steps_has_a_page() {
    let folder = tempfile::tempdir().unwrap();
    create(folder.path()).finish().unwrap();
    assert_has(
        &read(folder.path(), "index.html"),
        &["No step was logged yet."],
    );

    let mut log = quiet(RunLog::resume(folder.path(), 0).unwrap());
    std::fs::remove_file(folder.path().join("index.html")).unwrap();
    let mut run = MadeUp::new();
    run.log(&mut log, [1.0]);
    assert!(
        !folder.path().join("index.html").exists(),
        "not in the first second"
    );
    std::thread::sleep(std::time::Duration::from_millis(1100));
    run.log(&mut log, [1.0]);
    assert_has(
        &read(folder.path(), "index.html"),
        &["Running: step 2", r#""refresh":{"#],
    );
    // The rows are flushed later.
    log.finish().unwrap();
}

#[test]
fn a_short_run_that_an_error_ended_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = MadeUp::new();
    let mut log = create(folder.path());
    run.log(&mut log, [1.0, 2.0, 3.0]);
    log.stopped_by("the GPU is gone").unwrap();
    let page = read(folder.path(), "index.html");
    assert_has(
        &page,
        &[
            "Stopped at step 3, after",
            "The run was stopped by this: the GPU is gone",
            "exactly zero in all of the last 3 steps: b.",
        ],
    );
    // A resumed run is no longer stopped.
    quiet(RunLog::resume(folder.path(), 3).unwrap())
        .finish()
        .unwrap();
    assert!(!read(folder.path(), "index.html").contains("was stopped by"));
}
