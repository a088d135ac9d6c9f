//! Which runs a study does.

use std::fs;

use oscillating_loss::commands::study::Study;
use oscillating_loss::outcome::{Outcome, Writer, read};
use oscillating_loss::settings::{OptimizerKind, Settings};

fn study() -> Study {
    Study {
        arms: vec!["none".parse().unwrap(), "auto".parse().unwrap()],
        optimizers: vec![OptimizerKind::Sgd],
        powers: vec![4.0],
        rates: vec![1e-3, 1e-2, 1e-1],
        seeds: 2,
        steps: 500,
    }
}

#[test]
fn a_plan_has_everything_once_and_whole_studies_first() {
    let plan = study().plan();
    assert_eq!(plan.len(), 12);
    assert!(plan[..6].iter().all(|settings| settings.seed == 0));
    for (at, settings) in plan.iter().enumerate() {
        assert!(!plan[..at].contains(settings));
    }
    let by_default = Study {
        rates: Vec::new(),
        optimizers: vec![OptimizerKind::Sgd, OptimizerKind::AdamW],
        ..study()
    };
    assert_eq!(by_default.plan().len(), 40);
}

#[test]
fn what_cannot_be_written_down_is_written_later() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("runs.jsonl");
    let outcome = |settings: Settings| Outcome {
        settings,
        diverged: None,
        final_test_loss: Some(1.0),
        best_test_loss: None,
        roughness: None,
        max_total_norm: 1.0,
        clipped_fraction: 0.0,
        num_skipped: 0,
        ms_per_step: 0.0,
    };
    let all: Vec<Outcome> = study().plan().into_iter().map(outcome).collect();
    let mut writer = Writer::new(&file);
    fs::create_dir(&file).unwrap();
    writer.add(&all[0]).unwrap_err();
    writer.add(&all[1]).unwrap(); // said once
    writer.write().unwrap_err();
    fs::remove_dir(&file).unwrap();
    writer.add(&all[2]).unwrap();
    assert_eq!(read(&file).unwrap(), all[..3]);
}

#[test]
fn the_best_rates_are_those_of_the_first_seed() {
    let done = |settings: &Settings| {
        let loss = match (settings.arm.is_none(), settings.lr) {
            (true, lr) if lr > 5e-2 => None, // diverged
            (true, lr) => Some(lr),
            (false, lr) => Some(1.0 - lr - 0.9 * settings.seed as f64),
        };
        Outcome {
            settings: settings.clone(),
            diverged: None,
            final_test_loss: loss,
            best_test_loss: loss,
            roughness: None,
            max_total_norm: 1.0,
            clipped_fraction: 0.0,
            num_skipped: 0,
            ms_per_step: 0.0,
        }
    };
    let done: Vec<Outcome> = study().plan().iter().map(done).collect();
    let rates = |count| {
        let best = study().plan_best(&done, count);
        best.iter().map(|settings| settings.lr).collect::<Vec<_>>()
    };
    assert_eq!(rates(1), [1e-3, 1e-1, 1e-3, 1e-1]);
    assert_eq!(rates(2)[..4], [1e-3, 1e-2, 1e-1, 1e-2]);
    assert!(study().plan_best(&[], 2).is_empty());
}
