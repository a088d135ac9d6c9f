//! Long runs.

use std::fs;
use std::time::Instant;

use crate::made_up::{MadeUp, create};

/// Logs the same report again and again, and prints what a step costs: run with `--nocapture`.
#[test]
fn a_hundred_thousand_steps_stay_small() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = MadeUp::new();
    let mut log = create(folder.path());
    let reports: Vec<_> = (1..=100)
        .map(|scale| run.step(f64::from(scale) / 10.0))
        .collect();
    let start = Instant::now();
    let mut steps = 0;
    for round in 0..1000 {
        for report in &reports {
            steps += 1;
            let loss = f64::from(round) / f64::from(steps % 97 + 1);
            log.step(report, loss).unwrap();
        }
    }
    let each = start.elapsed() / steps as u32;
    log.finish().unwrap();
    println!("{each:?} a step");
    let size = |name: &str| fs::metadata(folder.path().join(name)).unwrap().len();
    println!("page: {} bytes", size("index.html"));
    assert!(size("index.html") < 5_000_000, "{}", size("index.html"));
    assert!(
        size("param_norms.csv") < 1_000_000,
        "{}",
        size("param_norms.csv")
    );
}
