//! A process that is killed, at whatever moment, leaves a checkpoint from which the next goes on.

use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use candle_core::DType;
use support::checkpoints::{Folder, names_in};

use super::Run;
use crate::files::start;

const KEPT: usize = 2;

/// Some files of some pieces each.
fn run(dir: &Path) -> Result<Run> {
    let mut run = Run::of(
        dir,
        &[
            ("a.weight", &[60_000], DType::F32),
            ("b.bias", &[4], DType::F64),
        ],
    )?;
    run.checkpoints = run.checkpoints.keep_last(KEPT);
    Ok(run)
}

/// Nothing, unless the tests below run it: saves until it is killed.
#[test]
fn a_run_without_end() -> Result<()> {
    let Some(folder) = std::env::var_os("CHECKPOINT_FOLDER") else {
        return Ok(());
    };
    let mut run = run(Path::new(&folder))?;
    let start = run.load_latest()?.unwrap_or(0);
    assert_eq!(run.opt.inner().steps(), start);
    run.steps(start + 1..=u64::MAX)
}

fn last_step(folder: &Path) -> Result<Option<u64>> {
    let names = names_in(folder)?;
    let steps = names
        .iter()
        .filter_map(|name| name.strip_prefix("step-")?.parse().ok());
    Ok(steps.max())
}

fn survives(kills: usize, seed: u64) -> Result<()> {
    let folder = Folder::new()?;
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut in_saves, mut reached) = (0, 0);
    for kill in 0..kills {
        let mut process = start(&[], "training::kills::a_run_without_end", &folder, 0)?;
        // At first a process starts and loads. Two of three live until they have saved.
        let before = last_step(&folder)?;
        while kill % 3 > 0 && last_step(&folder)? == before {
            assert!(process.try_wait()?.is_none(), "it ended by itself");
            sleep(Duration::from_micros(300));
        }
        sleep(Duration::from_micros(rng.u64(0..30_000)));
        process.kill()?;
        process.wait()?;

        let hidden = names_in(&folder)?
            .into_iter()
            .filter(|name| name.starts_with('.'))
            .count();
        // Of the last kill only, as each save removes those of the one before.
        assert!(hidden <= 2, "{:?}", names_in(&folder)?);
        in_saves += usize::from(hidden > 0);
        let mut resumed = run(&folder)?;
        let step = resumed.load_latest()?.unwrap_or(0);
        assert_eq!(resumed.opt.inner().steps(), step);
        assert!(
            step >= reached && step >= before.unwrap_or(0),
            "{step} after {reached}"
        );
        reached = step;
        // Bit for bit the run that was never killed.
        if kill + 1 == kills {
            let mut straight = run(&Folder::in_memory()?)?;
            (0..step).try_for_each(|_| straight.step())?;
            assert_eq!(resumed.everything()?, straight.everything()?);
        }
    }
    println!("{kills} kills, {in_saves} of them during a save; {reached} steps");
    assert!(reached > 0 && in_saves > 0);
    let mut last = run(&folder)?;
    last.load_latest()?;
    last.steps(reached + 1..=reached + 1)?;
    assert_eq!(names_in(&folder)?.len(), KEPT);
    Ok(())
}

#[test]
fn load_latest_after_12_kills() -> Result<()> {
    survives(12, 1)
}

#[test]
#[ignore = "takes 5 to 30 seconds"]
fn load_latest_after_100_kills() -> Result<()> {
    survives(100, 2)
}
