//! A save leaves a whole file: the old one where it fails, the new one where it does not.

use std::fs;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Var};
use candle_grad_clip::Error;
use candle_grad_clip::optim::AdamW;
use candle_nn::{Optimizer, ParamsAdamW};
use support::checkpoints::{Folder, SmallDisk, names_in};
use support::device::device;

use super::resume::{in_a_new_process, pair, small};

#[test]
fn a_save_that_cannot_be_leaves_what_is_there() -> Result<()> {
    let folder = Folder::new()?;
    let (_, named) = small()?;
    let opt = AdamW::from_named_vars(named, ParamsAdamW::default())?;
    fs::create_dir(folder.join("folder"))?;
    for path in [
        folder.join("folder"),
        folder.join("no/such"),
        folder.join(".."),
        "".into(),
    ] {
        assert!(opt.save(&path).is_err(), "{}", path.display());
    }
    if cfg!(unix) {
        assert!(opt.save("/dev/null").is_err()); // and it is still a device:
        assert!(!fs::metadata("/dev/null")?.is_file());
    }
    assert_eq!(names_in(&folder)?, ["folder"]);
    assert_eq!(names_in(&folder.join("folder"))?, [""; 0]);
    Ok(())
}

/// An optimizer whose file is larger than 64 KiB.
fn large() -> Result<AdamW> {
    let w = Var::ones(20_000, DType::F32, device())?;
    let mut opt = AdamW::from_named_vars(vec![pair("w", &w)], ParamsAdamW::default())?;
    opt.backward_step(&w.sqr()?.sum_all()?)?;
    Ok(opt)
}

/// Nothing, unless one of the tests below runs it: where files must stay small.
#[test]
fn a_save_without_room() -> Result<()> {
    let Some(folder) = std::env::var_os("CHECKPOINT_FOLDER") else {
        return Ok(());
    };
    let error = large()?.save(Path::new(&folder).join("o")).unwrap_err();
    assert!(matches!(error, Error::CheckpointIo { .. }), "{error}");
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_file_whole() -> Result<()> {
    let Some(disk) = SmallDisk::mount()? else {
        println!("skipped: no small disk here (files of limited size are tested all the same)");
        return Ok(());
    };
    leaves_the_old_file_whole(&disk, None)
}

/// As on a full disk, without one.
#[cfg(unix)]
#[test]
fn a_write_that_fails_leaves_the_old_file_whole() -> Result<()> {
    leaves_the_old_file_whole(&Folder::new()?, Some("trap '' XFSZ; ulimit -f 64"))
}

#[cfg(unix)]
fn leaves_the_old_file_whole(folder: &Path, shell: Option<&str>) -> Result<()> {
    let (_, named) = small()?;
    let opt = AdamW::from_named_vars(named, ParamsAdamW::default())?;
    opt.save(folder.join("o"))?;
    let before = fs::read(folder.join("o"))?;
    let status = in_a_new_process("saves::a_save_without_room", folder, shell)?;
    assert!(status.success(), "{status}");
    assert_eq!(fs::read(folder.join("o"))?, before);
    assert_eq!(names_in(folder)?, ["o"]);
    Ok(())
}

/// A process that is killed can't clean up: the next one does, once nobody can be writing there any
/// more.
#[cfg(target_os = "linux")]
#[test]
fn what_a_killed_save_leaves_is_removed_after_a_day() -> Result<()> {
    use std::time::{Duration, SystemTime};
    let folder = Folder::new()?;
    let (_, named) = small()?;
    let opt = AdamW::from_named_vars(named, ParamsAdamW::default())?;
    opt.save(folder.join("o"))?;
    let before = fs::read(folder.join("o"))?;
    let status = in_a_new_process("saves::a_save_without_room", &folder, Some("ulimit -f 64"))?;
    assert_eq!(status.code(), None); // by SIGXFSZ
    assert_eq!(fs::read(folder.join("o"))?, before);
    let names = names_in(&folder)?;
    assert_eq!(names.len(), 2, "{names:?}");
    let left = folder.join(&names[0]);
    let hours_old = |path: &Path, hours: u64| -> Result<()> {
        let time = SystemTime::now() - Duration::from_secs(hours * 60 * 60);
        Ok(fs::File::options()
            .write(true)
            .open(path)?
            .set_modified(time)?)
    };
    // Files of others, however old: a process of another container, another checkpoint, no number.
    let others = [
        ".o.1-0.tmp".to_string(),
        format!(".o.{}.tmp", "g".repeat(32)),
        format!(".o.{}", "0".repeat(32)),
        format!(".p.{}.tmp", "0".repeat(32)),
    ];
    for other in &others {
        fs::write(folder.join(other), "")?;
        hours_old(&folder.join(other), 1000)?;
    }
    // Somebody may be writing it.
    hours_old(&left, 23)?;
    large()?.save(folder.join("o"))?;
    assert!(left.exists());
    hours_old(&left, 25)?;
    large()?.save(folder.join("o"))?;
    let mut expected = others.to_vec();
    expected.push("o".to_string());
    expected.sort();
    assert_eq!(names_in(&folder)?, expected);
    Ok(())
}

#[test]
fn saving_again_replaces_the_file_and_gives_the_same_bytes() -> Result<()> {
    let folder = Folder::new()?;
    let opt = large()?;
    opt.save(folder.join("o"))?;
    let before = fs::read(folder.join("o"))?;
    opt.save(folder.join("o"))?;
    assert_eq!(fs::read(folder.join("o"))?, before);
    assert_eq!(names_in(&folder)?, ["o"]);
    Ok(())
}
