//! Full disks, and several processes that save to one folder.

use std::fs;
use std::path::Path;

use anyhow::Result;
use candle_core::DType;
use candle_grad_clip::{Checkpoint, Error};
use support::checkpoints::{Folder, SmallDisk, names_in};

use super::{Run, run_of};
use crate::files::start;
use crate::resume::in_a_new_process;

/// A run whose checkpoint is larger than 64 KiB.
fn large(dir: &Path) -> Result<Run> {
    Run::of(
        dir,
        &[
            ("a.weight", &[20_000], DType::F32),
            ("b.bias", &[4], DType::F64),
        ],
    )
}

/// Nothing, unless one of the tests below runs it: where files must stay small.
#[test]
fn a_save_without_room() -> Result<()> {
    let Some(folder) = std::env::var_os("CHECKPOINT_FOLDER") else {
        return Ok(());
    };
    let mut run = large(Path::new(&folder))?;
    run.checkpoints = run.checkpoints.keep_last(1);
    run.step()?;
    let error = run
        .checkpoints
        .save(3, &run.map, &run.opt, &())
        .unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::CheckpointIo { .. }), "{text}");
    assert!(text.contains("step-000003/model.safetensors: "), "{text}");
    Ok(())
}

#[cfg(unix)]
fn leaves_the_old_ones_whole(folder: &Path, shell: Option<&str>) -> Result<()> {
    let saved = run_of(folder, 2)?.everything()?;
    let status = in_a_new_process("training::writers::a_save_without_room", folder, shell)?;
    assert!(status.success(), "{status}");
    assert_eq!(names_in(folder)?, ["step-000001", "step-000002"]);
    let mut run = Run::new(folder)?;
    assert_eq!(run.load_latest()?, Some(2));
    assert_eq!(run.everything()?, saved);
    for checkpoint in run.checkpoints.list()? {
        checkpoint.restore(&run.map, &mut run.opt)?;
    }
    Ok(())
}

#[cfg(unix)]
#[test]
fn load_latest_after_a_full_disk() -> Result<()> {
    let Some(disk) = SmallDisk::mount()? else {
        println!("skipped: no small disk here (files of limited size are tested all the same)");
        return Ok(());
    };
    leaves_the_old_ones_whole(&disk, None)
}

/// As on a full disk, without one.
#[cfg(unix)]
#[test]
fn load_latest_after_a_write_that_failed() -> Result<()> {
    leaves_the_old_ones_whole(&Folder::new()?, Some("trap '' XFSZ; ulimit -f 64"))
}

const SAVES: u64 = 15;

/// Nothing, unless the tests below run it.
#[test]
fn a_writer() -> Result<()> {
    let Some(folder) = std::env::var_os("CHECKPOINT_FOLDER") else {
        return Ok(());
    };
    let kept: usize = std::env::var("CHECKPOINT_STEPS")?.parse()?;
    let mut run = large(Path::new(&folder))?;
    if kept > 0 {
        run.checkpoints = run.checkpoints.keep_last(kept);
    }
    run.steps(1..=SAVES)
}

/// Three processes that save the same steps to one folder, and a fourth that reads.
fn processes_save_to_one_folder(kept: usize) -> Result<Folder> {
    let folder = Folder::in_memory()?;
    let mut processes = Vec::new();
    for _ in 0..3 {
        processes.push(start(&[], "training::writers::a_writer", &folder, kept)?);
    }
    let mut run = large(&folder)?;
    let mut running = true;
    while running {
        running = false;
        for process in &mut processes {
            running |= process.try_wait()?.is_none();
        }
        run.load_latest()?;
    }
    for mut process in processes {
        let status = process.wait()?;
        assert!(status.success(), "{status}");
    }
    Ok(folder)
}

#[test]
fn load_latest_beside_processes_that_save_to_one_folder() -> Result<()> {
    let folder = processes_save_to_one_folder(0)?;
    let mut run = large(&folder)?;
    let all = run.checkpoints.list()?;
    for checkpoint in &all {
        checkpoint.restore(&run.map, &mut run.opt)?;
    }
    let mut steps: Vec<u64> = all.iter().map(Checkpoint::step).collect();
    steps.sort_unstable();
    let expected: Vec<u64> = (1..=SAVES).flat_map(|step| [step; 3]).collect();
    assert_eq!(steps, expected);
    assert_eq!(names_in(&folder)?.len(), all.len());
    Ok(())
}

#[test]
fn load_latest_beside_processes_that_also_remove() -> Result<()> {
    let folder = processes_save_to_one_folder(2)?;
    let mut run = large(&folder)?;
    assert!(run.load_latest()?.is_some());
    let hidden = names_in(&folder)?
        .into_iter()
        .filter(|name| name.starts_with('.'));
    assert_eq!(hidden.count(), 0);
    // What is left are the last saves of some of them.
    let left = names_in(&folder)?.len();
    assert!((1..=4).contains(&left), "{:?}", names_in(&folder)?);
    fs::remove_dir_all(&*folder)?;
    Ok(())
}
