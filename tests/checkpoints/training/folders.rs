//! What others have written stays, and is named where it is in the way; what killed saves left goes.

use std::fs;
use std::path::Path;

use anyhow::Result;
use candle_grad_clip::Checkpoints;
use candle_nn::VarMap;
use support::checkpoints::{Folder, names_in};

use super::{Run, run_of};

const MARKER: &str = ".candle-grad-clip";

#[test]
fn a_checkpoint_holds_what_it_says() -> Result<()> {
    let folder = Folder::in_memory()?;
    let run = run_of(&folder, 1)?;
    let names = names_in(&folder.join("step-000001"))?;
    let expected = [
        MARKER,
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ];
    assert_eq!(names, expected);
    // The weights are candle's own file.
    let file = |name: &str| folder.join("step-000001").join(name);
    run.map.save(folder.join("candle"))?;
    assert!(fs::read(folder.join("candle"))? == fs::read(file("model.safetensors"))?);
    let mut map: VarMap = super::Run::new(&folder)?.map;
    map.load(file("model.safetensors"))?;
    // And the optimizer's is the wrapper's own.
    run.opt.save(folder.join("wrapper"))?;
    assert!(fs::read(folder.join("wrapper"))? == fs::read(file("optimizer.safetensors"))?);
    assert_eq!(fs::read_to_string(file("state.json"))?, "1");
    Ok(())
}

#[test]
fn load_latest_finds_nothing_in_a_new_folder() -> Result<()> {
    let folder = Folder::in_memory()?;
    let mut run = Run::new(&folder.join("runs/new"))?;
    assert_eq!(run.load_latest()?, None);
    assert!(run.checkpoints.best()?.is_none() && run.checkpoints.list()?.is_empty());
    Ok(())
}

#[test]
fn what_others_call_a_checkpoint_is_named_and_stays() -> Result<()> {
    let ways: [fn(&Path) -> std::io::Result<()>; 4] = [
        |path| fs::write(path, "mine"),
        |path| fs::create_dir(path),
        |path| fs::create_dir(path).and_then(|()| fs::write(path.join("manifest.json"), "mine")),
        #[cfg(unix)]
        |path| std::os::unix::fs::symlink("other/step-000001", path),
        #[cfg(not(unix))]
        |path| fs::write(path, "mine"),
    ];
    for way in ways {
        let folder = Folder::in_memory()?;
        let mut run = run_of(&folder, 2)?;
        run_of(&folder.join("other"), 1)?;
        let (mine, before) = (folder.join("step-000003"), names_in(&folder)?);
        way(&mine)?;
        let error = Checkpoints::in_dir(&*folder).unwrap_err().to_string();
        assert!(
            error.contains("step-000003: in the way of checkpoints is something"),
            "{error}"
        );
        // It appears while a run is training: its save fails, nothing is lost, and the next is fine.
        let error = run.steps(3..=3).unwrap_err().to_string();
        assert!(
            error.contains("step-000003: in the way of checkpoints is something"),
            "{error}"
        );
        assert_eq!(names_in(&folder)?.len(), before.len() + 1);
        assert_eq!(run.load_latest()?, Some(2));
        run.checkpoints = run.checkpoints.clone().keep_last(1);
        run.steps(4..=4)?;
        assert_eq!(names_in(&folder)?, ["other", "step-000003", "step-000004"]);
        run.checkpoints.clear()?;
        assert_eq!(names_in(&folder)?, ["other", "step-000003"]);
        assert!(folder.join("other/step-000001/manifest.json").exists());
    }
    Ok(())
}

/// Names that are almost those of checkpoints are nobody's business.
#[test]
fn other_names_are_left_alone() -> Result<()> {
    let folder = Folder::in_memory()?;
    let others = [
        "step-1",
        "step-000001x",
        "step-000001-1",
        "step-000001-02",
        "step-",
        "checkpoint-500",
        "notes.txt",
    ];
    for other in others {
        fs::write(folder.join(other), "mine")?;
    }
    let mut run = Run::new(&folder)?;
    run.checkpoints = run.checkpoints.clone().keep_last(1);
    run.steps(1..=3)?;
    assert_eq!(run.load_latest()?, Some(3));
    run.checkpoints.clear()?;
    let mut expected = others.to_vec();
    expected.sort_unstable();
    assert_eq!(names_in(&folder)?, expected);
    Ok(())
}

#[test]
fn notes_in_a_checkpoint_keep_it() -> Result<()> {
    let folder = Folder::in_memory()?;
    let mut run = run_of(&folder, 1)?;
    let notes = folder.join("step-000001/notes.txt");
    fs::write(&notes, "mine")?;
    assert_eq!(Run::new(&folder)?.load_latest()?, Some(1));
    run.checkpoints = run.checkpoints.clone().keep_last(1);
    run.steps(2..=3)?;
    assert_eq!(names_in(&folder)?, ["step-000001", "step-000003"]);
    run.checkpoints.save(1, &run.map, &run.opt, &())?;
    run.checkpoints.clear()?;
    assert_eq!(names_in(&folder)?, ["step-000001"]);
    assert_eq!(names_in(&folder.join("step-000001"))?.len(), 6);
    fs::remove_file(&notes)?;
    run.checkpoints.clear()?;
    assert!(names_in(&folder)?.is_empty());
    Ok(())
}

#[test]
fn what_killed_saves_left_is_removed_by_the_next() -> Result<()> {
    let folder = Folder::in_memory()?;
    let mut run = run_of(&folder, 1)?;
    let left = |number: usize| folder.join(format!(".checkpoint-{number:032x}.tmp"));
    // Right after the folder was made; with a file; all but renamed.
    for number in 0..3 {
        fs::create_dir(left(number))?;
    }
    fs::write(left(1).join(MARKER), "")?;
    fs::write(left(1).join("model.safetensors"), "half")?;
    for name in names_in(&folder.join("step-000001"))? {
        fs::copy(folder.join("step-000001").join(&name), left(2).join(&name))?;
    }
    // Others: without the marker, with a file of others, no folder, no number.
    fs::create_dir(left(3))?;
    fs::write(left(3).join("model.safetensors"), "mine")?;
    fs::create_dir(left(4))?;
    fs::write(left(4).join(MARKER), "")?;
    fs::write(left(4).join("notes"), "mine")?;
    fs::write(left(5), "mine")?;
    fs::create_dir(folder.join(".checkpoint-x.tmp"))?;
    assert_eq!(run.load_latest()?, Some(1));
    run.steps(2..=2)?;
    let names = names_in(&folder)?;
    for number in 0..3 {
        assert!(!left(number).exists(), "{names:?}");
    }
    for number in 3..6 {
        assert!(left(number).exists(), "{names:?}");
    }
    assert_eq!(names.len(), 4 + 2, "{names:?}");
    Ok(())
}
