//! A process that is killed again and again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use candle_grad_clip_log::{RunLog, read_metrics, read_param_norms, read_scalars};

use crate::made_up::{FILES, MadeUp, names, quiet, read};

const KILLS: u64 = 15;
const FOLDER: &str = "CANDLE_GRAD_CLIP_LOG_TEST_FOLDER";

/// The step of the last checkpoint, which here is only this number.
fn last_checkpoint(folder: &Path) -> u64 {
    let text = fs::read_to_string(folder.join("checkpoint"));
    text.map_or(0, |text| text.parse().unwrap())
}

/// The process that is killed: it logs until then. Does nothing unless the test below starts it.
#[test]
fn child() {
    let Ok(folder) = std::env::var(FOLDER) else {
        return;
    };
    let folder = PathBuf::from(folder);
    let mut step = last_checkpoint(&folder);
    let log = RunLog::resume(&folder, step).unwrap();
    let mut log = quiet(log).with_page_interval(Duration::ZERO);
    let mut run = MadeUp::new();
    loop {
        step += 1;
        run.log(&mut log, [1.0]);
        log.scalar("loss/test", step, 0.5).unwrap();
        if step.is_multiple_of(7) {
            log.flush().unwrap();
            let beside = folder.join("checkpoint.new");
            fs::write(&beside, step.to_string()).unwrap();
            fs::rename(beside, folder.join("checkpoint")).unwrap();
        }
    }
}

#[test]
fn no_step_is_lost_or_doubled_by_kills_at_any_moment() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["kill::child", "--exact"])
            .env(FOLDER, folder)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(50 + 37 * kill % 90));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let step = last_checkpoint(folder);
    assert!(step > 0, "no process came to its first checkpoint");
    quiet(RunLog::resume(folder, step).unwrap())
        .finish()
        .unwrap();
    let all: Vec<u64> = (1..=step).collect();
    let rows = read_metrics(folder.join("metrics.csv")).unwrap();
    assert!(rows.iter().map(|row| row.step).eq(all.iter().copied()));
    let scalars = read_scalars(folder.join("scalars.csv")).unwrap();
    assert!(scalars.iter().map(|row| row.step).eq(all.iter().copied()));
    let norms = read_param_norms(folder.join("param_norms.csv")).unwrap();
    assert!(norms.iter().all(|row| row.last_step <= step));
    assert!(read(folder, "index.html").contains("Finished at step"));
    // No half file stays.
    let mut left = names(folder);
    left.dedup();
    left.retain(|name| !name.starts_with("checkpoint"));
    assert_eq!(left, FILES);
}
