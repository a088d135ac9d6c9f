//! What a study keeps of a run.

use std::fs;
use std::path::Path;

use oscillating_loss::outcome::{Outcome, Writer, read};
use oscillating_loss::settings::Settings;

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_that_names_the_file() {
    let outcome = Outcome {
        settings: Settings::default(),
        diverged: None,
        final_test_loss: None,
        best_test_loss: None,
        roughness: None,
        max_total_norm: 1.0,
        clipped_fraction: 0.0,
        num_skipped: 0,
        ms_per_step: 0.0,
    };
    let error = Writer::new(Path::new("/dev/full"))
        .add(&outcome)
        .unwrap_err();
    assert_eq!(error.to_string(), "can't write `/dev/full`");
}

#[test]
fn what_is_appended_is_read_back_without_a_line_that_was_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("runs.jsonl");
    assert_eq!(read(&path).unwrap(), []);
    let outcome = |seed, loss| Outcome {
        settings: Settings {
            seed,
            ..Settings::default()
        },
        diverged: None,
        final_test_loss: loss,
        best_test_loss: loss,
        roughness: Some(0.1 + 0.2),
        max_total_norm: 1e300,
        clipped_fraction: 1.0 / 3.0,
        num_skipped: 2,
        ms_per_step: 0.0,
    };
    let all = [
        outcome(0, Some(5e-324)),
        outcome(1, None),
        outcome(2, Some(0.3)),
    ];
    for outcome in &all {
        Writer::new(&path).add(outcome).unwrap();
    }
    assert_eq!(read(&path).unwrap(), all);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    assert_eq!(read(&path).unwrap(), all[..2]);
    Writer::new(&path).add(&all[2]).unwrap();
    assert_eq!(read(&path).unwrap(), all);
    fs::write(&path, "{}\n").unwrap();
    let error = format!("{:#}", read(&path).unwrap_err());
    assert!(error.contains("line 1"), "{error}");
}
