//! What is damaged is passed over with a warning, and changes nothing.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use candle_grad_clip::Error;
use support::checkpoints::Folder;
use support::events::{events, of_level};
use tracing::Level;

use super::{Run, run_of};

const FILES: [&str; 4] = [
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
];

/// Ways to damage a file.
fn damaged(whole: &[u8]) -> Vec<Vec<u8>> {
    let mut ways = vec![
        whole[..whole.len() / 2].to_vec(),
        Vec::new(),
        [whole, b" "].concat(),
    ];
    for at in [0, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.to_vec();
        flipped[at] ^= 1;
        ways.push(flipped);
    }
    ways
}

#[test]
fn load_latest_falls_back_when_the_newest_is_damaged() -> Result<()> {
    let folder = Folder::in_memory()?;
    let older = run_of(&folder, 2)?.everything()?;
    let newest = run_of(&folder.join("other"), 3)?;
    fs::rename(folder.join("other/step-000003"), folder.join("step-000003"))?;
    let is_older = |name: &str| -> Result<()> {
        let mut run = Run::new(&folder)?;
        let seen = events(|| {
            assert_eq!(run.load_latest()?, Some(2));
            Ok(())
        })?;
        assert_eq!(run.everything()?, older);
        let warnings = of_level(&seen, Level::WARN);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        let (reason, damaged) = (&warnings[0].0["reason"], &warnings[0].0["damaged"]);
        assert!(reason.contains(name), "{reason}");
        assert!(damaged.ends_with("step-000003"), "{damaged}");
        assert!(warnings[0].0["instead"].ends_with("step-000002"));
        Ok(())
    };
    for name in FILES {
        let path = folder.join("step-000003").join(name);
        let whole = fs::read(&path)?;
        for damaged in damaged(&whole) {
            fs::write(&path, damaged)?;
            is_older(name)?;
        }
        fs::remove_file(&path)?;
        is_older(name)?;
        fs::create_dir(&path)?;
        is_older(name)?;
        fs::remove_dir(&path)?;
        fs::write(&path, whole)?;
    }
    let mut run = Run::new(&folder)?;
    assert_eq!(run.load_latest()?, Some(3));
    assert_eq!(run.everything()?, newest.everything()?);
    Ok(())
}

#[test]
fn load_latest_lists_what_is_wrong_when_all_are_damaged() -> Result<()> {
    let folder = Folder::in_memory()?;
    let saved = run_of(&folder, 3)?;
    fs::write(folder.join("step-000003/state.json"), "4")?;
    fs::remove_file(folder.join("step-000002/model.safetensors"))?;
    fs::write(folder.join("step-000001/manifest.json"), "")?;
    let mut run = Run::new(&folder)?;
    let before = run.everything()?;
    let error = run.load_latest().unwrap_err();
    let text = error.to_string();
    let Error::CheckpointsDamaged { path, damage } = error else {
        panic!("{text}");
    };
    assert_eq!((path, damage.len()), (PathBuf::from(&*folder), 3));
    for (step, what) in [
        (3, "state.json is damaged: its checksum is "),
        (2, "model.safetensors is missing"),
        (1, "manifest.json is cut short: it has 0 bytes"),
    ] {
        assert!(text.contains(&format!("step-{step:06}: {what}")), "{text}");
    }
    assert_eq!(run.everything()?, before);
    // The run that saved them goes on, and its next checkpoint is the newest.
    let mut saved = saved;
    saved.steps(4..=4)?;
    assert_eq!(run.load_latest()?, Some(4));
    Ok(())
}

/// A run that went back to an older checkpoint saves the step of the damaged one again.
#[test]
fn load_latest_takes_the_one_saved_last() -> Result<()> {
    let folder = Folder::in_memory()?;
    run_of(&folder, 3)?;
    fs::write(folder.join("step-000003/state.json"), "4")?;
    let mut run = Run::new(&folder)?;
    assert_eq!(run.load_latest()?, Some(2));
    run.steps(3..=3)?;
    let newest = run.checkpoints.latest()?.unwrap();
    assert_eq!(
        (newest.step(), newest.path()),
        (3, &*folder.join("step-000003-2"))
    );
    // A run that starts anew in an old folder resumes from its own checkpoint.
    let mut anew = run_of(&folder, 1)?;
    assert_eq!(anew.load_latest()?, Some(1));
    let steps: Vec<u64> = anew
        .checkpoints
        .list()?
        .iter()
        .map(candle_grad_clip::Checkpoint::step)
        .collect();
    assert_eq!(steps, [1, 2, 3, 3, 1]);
    Ok(())
}

#[test]
fn load_latest_refuses_a_newer_format() -> Result<()> {
    let folder = Folder::in_memory()?;
    run_of(&folder, 2)?;
    let path = folder.join("step-000002/manifest.json");
    let text = fs::read_to_string(&path)?.replace("\"format_version\": 1", "\"format_version\": 2");
    let (start, _) = text.rsplit_once(",\n  \"crc32\": \"").unwrap();
    let sum = crc32fast::hash(start.as_bytes());
    fs::write(&path, format!("{start},\n  \"crc32\": \"{sum:08x}\"\n}}\n"))?;
    let mut run = Run::new(&folder)?;
    let error = run.load_latest().unwrap_err().to_string();
    assert!(
        error.contains("its format version is 2, expected 1; it was written by candle-grad-clip"),
        "{error}"
    );
    Ok(())
}
