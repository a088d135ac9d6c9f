//! Several writers of one path, threads and processes, leave a whole file.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use candle_grad_clip::optim::AdamW;
use support::checkpoints::{Folder, names_in};

use super::files::{after, start};

/// Elements of the Var that the writers below save: some pieces of a file.
const ELEMENTS: usize = 300_000;
const SAVES: usize = 15;

/// Which steps a file was saved after, if it is whole: it has the bytes of one of the writers.
fn writer_of(file: &Path, writers: &[Vec<u8>]) -> Result<usize> {
    let bytes = fs::read(file)?;
    let writer = writers.iter().position(|whole| *whole == bytes);
    writer.ok_or_else(|| anyhow::anyhow!("{} bytes of no writer", bytes.len()))
}

/// What each of some writers writes, the first of them under the final name.
fn writers(folder: &Path, count: usize) -> Result<(Vec<AdamW>, Vec<Vec<u8>>)> {
    let (mut opts, mut whole) = (Vec::new(), Vec::new());
    for steps in (1..=count).rev() {
        let opt = after(steps, ELEMENTS)?;
        opt.save(folder.join("o"))?;
        whole.insert(0, fs::read(folder.join("o"))?);
        opts.insert(0, opt);
    }
    Ok((opts, whole))
}

#[test]
fn threads_that_save_to_one_path_leave_a_whole_file() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("o");
    let (opts, whole) = writers(&folder, 3)?;
    let save = &|opt: &AdamW| (0..SAVES).try_for_each(|_| opt.save(&path));
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = opts
            .iter()
            .map(|opt| scope.spawn(move || save(opt)))
            .collect();
        while !threads
            .iter()
            .all(std::thread::ScopedJoinHandle::is_finished)
        {
            writer_of(&path, &whole)?;
        }
        for thread in threads {
            thread.join().unwrap()?;
        }
        Ok(())
    })?;
    writer_of(&path, &whole)?;
    assert_eq!(names_in(&folder)?, ["o"]);
    Ok(())
}

/// Nothing, unless the tests below run it.
#[test]
fn a_writer() -> Result<()> {
    let Some(folder) = std::env::var_os("CHECKPOINT_FOLDER") else {
        return Ok(());
    };
    let opt = after(std::env::var("CHECKPOINT_STEPS")?.parse()?, ELEMENTS)?;
    (0..SAVES).try_for_each(|_| opt.save(Path::new(&folder).join("o")))?;
    Ok(())
}

fn processes_leave_a_whole_file(command: &[&str]) -> Result<()> {
    let folder = Folder::in_memory()?;
    let (_, whole) = writers(&folder, 3)?;
    let mut processes = Vec::new();
    for steps in 1..=3 {
        processes.push(start(command, "writers::a_writer", &folder, steps)?);
    }
    let mut running = true;
    while running {
        running = false;
        for process in &mut processes {
            running |= process.try_wait()?.is_none();
        }
        writer_of(&folder.join("o"), &whole)?;
    }
    for mut process in processes {
        let status = process.wait()?;
        assert!(status.success(), "{status}");
    }
    assert_eq!(names_in(&folder)?, ["o"]);
    Ok(())
}

#[test]
fn processes_that_save_to_one_path_leave_a_whole_file() -> Result<()> {
    processes_leave_a_whole_file(&[])
}

/// As in two containers on one volume: each process is the first of its own namespace, and has the
/// id 1.
#[cfg(target_os = "linux")]
#[test]
fn processes_of_equal_ids_leave_a_whole_file() -> Result<()> {
    let unshare = ["unshare", "--pid", "--fork", "--mount-proc"];
    let probe = Command::new(unshare[0])
        .args(&unshare[1..])
        .arg("true")
        .output();
    if !probe.is_ok_and(|output| output.status.success()) {
        println!(
            "skipped: no unshare --pid here (equal names are forced in a test of the library)"
        );
        return Ok(());
    }
    processes_leave_a_whole_file(&unshare)
}
