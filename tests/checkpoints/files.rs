//! The files of checkpoints: several writers, links, modes, names, folders, and what is not saved
//! or not loaded.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Result;
use candle_core::{DType, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NamedVars, NonFinite};
use candle_nn::{Optimizer, ParamsAdamW};
use support::again::test_again;
use support::checkpoints::{Folder, names_in};
use support::device::device;

use crate::resume::pair;

/// An optimizer of a Var with so many elements that has taken so many steps.
pub(super) fn after(steps: usize, elements: usize) -> Result<AdamW> {
    let w = Var::ones(elements, DType::F32, device())?;
    let mut opt = AdamW::from_named_vars(vec![pair("w", &w)], ParamsAdamW::default())?;
    for _ in 0..steps {
        opt.backward_step(&w.sqr()?.sum_all()?)?;
    }
    Ok(opt)
}

/// Starts a test in a new process, behind a command such as `unshare`.
pub(super) fn start(command: &[&str], test: &str, folder: &Path, steps: usize) -> Result<Child> {
    let mut command = test_again(command, test)?;
    command.stdout(Stdio::null());
    command.env("CHECKPOINT_FOLDER", folder);
    command.env("CHECKPOINT_STEPS", steps.to_string());
    Ok(command.spawn()?)
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_stay() -> Result<()> {
    use std::os::unix::fs::symlink;
    let folder = Folder::new()?;
    fs::create_dir(folder.join("store"))?;
    let target = folder.join("store/file");
    symlink("store/file", folder.join("near"))?; // points to nothing, yet
    symlink(folder.join("near"), folder.join("far"))?;
    let mut opt = after(1, 3)?;
    for link in ["near", "far"] {
        opt.save(folder.join(link))?;
        assert!(fs::symlink_metadata(folder.join(link))?.is_symlink());
        assert!(fs::symlink_metadata(&target)?.is_file());
        opt.load(&target)?;
        opt.load(folder.join(link))?;
        fs::write(&target, "old")?;
    }
    assert_eq!(names_in(&folder)?, ["far", "near", "store"]);
    assert_eq!(names_in(&folder.join("store"))?, ["file"]);

    symlink("round", folder.join("round"))?;
    symlink("store", folder.join("folder"))?;
    for (link, expected) in [("round", "symbolic links"), ("folder", "not a file")] {
        let error = opt.save(folder.join(link)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(fs::symlink_metadata(folder.join(link))?.is_symlink());
    }
    Ok(())
}

#[cfg(unix)]
#[test]
fn the_mode_of_a_file_is_kept() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new()?;
    let path = folder.join("o");
    let mode =
        |path: &Path| -> Result<u32> { Ok(fs::metadata(path)?.permissions().mode() & 0o7777) };
    let opt = after(1, 3)?;
    opt.save(&path)?;
    // A new file has the mode that any file has.
    fs::write(folder.join("any"), "")?;
    assert_eq!(mode(&path)?, mode(&folder.join("any"))?);
    for kept in [0o600, 0o640, 0o666, 0o444] {
        fs::set_permissions(&path, fs::Permissions::from_mode(kept))?;
        opt.save(&path)?;
        assert_eq!(mode(&path)?, kept, "{kept:o}");
    }
    Ok(())
}

#[test]
fn names_as_long_as_the_system_allows() -> Result<()> {
    let folder = Folder::new()?;
    let mut opt = after(1, 3)?;
    for name in ["x".repeat(241), "x".repeat(255), "é".repeat(127)] {
        let path = folder.join(&name);
        if fs::write(&path, "old").is_err() {
            println!("skipped: no names of {} bytes here", name.len());
            continue;
        }
        opt.save(&path)?;
        opt.load(&path)?;
        assert_eq!(names_in(&folder)?, [name]);
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Nothing, unless the test below runs it.
#[test]
fn a_save_into_a_folder_that_cannot_be_read() -> Result<()> {
    let Some(folder) = std::env::var_os("CHECKPOINT_FOLDER") else {
        return Ok(());
    };
    let path = Path::new(&folder).join("o");
    let mut opt = after(2, 3)?;
    let error = opt.save(&path).unwrap_err();
    assert!(
        matches!(&error, Error::CheckpointNotDurable { source, path: at }
            if source.kind() == std::io::ErrorKind::PermissionDenied && *at == path),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains("the new file is in place and whole"),
        "{text}"
    );
    opt = after(0, 3)?;
    opt.load(&path)?;
    assert_eq!(opt.steps(), 2);
    Ok(())
}

/// The error says that the file was replaced. The user must not be root, to whom every folder is
/// open.
#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_cannot_be_synced_is_told_from_a_save_that_failed() -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    const NOBODY: u32 = 65534;
    let folder = Folder::new()?;
    let inner: PathBuf = folder.join("inner");
    fs::create_dir(&inner)?;
    let is_root = fs::metadata(&inner)?.uid() == 0;
    let setpriv = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let command: &[&str] = if is_root { &setpriv } else { &[] };
    if is_root {
        chown(&inner, Some(NOBODY), Some(NOBODY))?;
        let this = std::env::current_exe()?;
        let probe = Command::new(setpriv[0])
            .args(&setpriv[1..])
            .arg(this)
            .arg("--list")
            .output();
        if !probe.is_ok_and(|output| output.status.success()) {
            println!("skipped: this is root, and no other user can run this test");
            return Ok(());
        }
    }
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o300))?;
    let test = "files::a_save_into_a_folder_that_cannot_be_read";
    let status = start(command, test, &inner, 0)?.wait()?;
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o700))?;
    assert!(status.success(), "{status}");
    assert_eq!(names_in(&inner)?, ["o"]);
    Ok(())
}

/// State that `Propagate` has ruined is not saved over a good file, unless that is asked for.
#[test]
fn ruined_state_is_saved_only_if_insisted_on() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("o");
    let good = Var::new(&[1f32], device())?;
    let bad = Var::new(&[2f32, 3.0], device())?;
    let vars = vec![pair("good", &good), pair("bad", &bad)];
    let clip = Clip::norm(1.0).non_finite(NonFinite::Propagate);
    let make = || -> Result<_> {
        let inner = AdamW::from_named_vars(vars.clone(), ParamsAdamW::default())?;
        Ok(ClippedOptimizer::wrap(inner, vars.clone(), clip.clone())?)
    };
    let mut opt = make()?;
    let loss = good.sqr()?.sum_all()? + bad.sqr()?.sum_all()?;
    opt.backward_step(&loss?)?;
    opt.save(&path)?;
    let before = fs::read(&path)?;
    let mut same = make()?;
    same.load(&path)?;
    opt.inner_mut()
        .backward_step(&(bad.sqr()?.sum_all()? * f64::NAN)?)?;
    for result in [opt.save(&path), opt.inner().save(&path)] {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Checkpoint { .. }));
        let text = error.to_string();
        assert!(
            text.contains("\"bad.first_moment\"") && text.contains("save_non_finite"),
            "{text}"
        );
    }
    assert_eq!(fs::read(&path)?, before);
    assert_eq!(names_in(&folder)?, ["o"]);
    for insist in [0, 1] {
        match insist {
            0 => opt.save_non_finite(&path)?,
            _ => opt.inner().save_non_finite(&path)?,
        }
        let mut resumed = make()?;
        resumed.load(&path)?;
        assert_eq!(resumed.inner().steps(), 2);
        assert!(resumed.save(&path).is_err());
    }
    Ok(())
}

/// In another order of the Vars moments of one shape would go to the wrong one.
#[test]
fn places_are_no_names() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("o");
    let (a, b) = (Var::new(&[1f32], device())?, Var::new(&[5f32], device())?);
    let vars = || vec![a.clone(), b.clone()];
    let params = ParamsAdamW::default;
    let refused = |result: candle_grad_clip::Result<()>| {
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("`from_named_vars`") && error.contains("by_place"),
            "{error}"
        );
    };
    refused(AdamW::new(vars(), params())?.save(&path));
    refused(Sgd::new(vars(), 0.1.into())?.save(&path));
    refused(
        ClippedOptimizer::wrap(AdamW::new(vars(), params())?, vars(), Clip::none())?.save(&path),
    );
    // A wrapper that was given more than is trained.
    let adamw = AdamW::new(vec![a.clone()], params())?;
    refused(ClippedOptimizer::wrap(adamw, vars(), Clip::none())?.save(&path));
    // A wrapper that names one of two.
    let one = vec![pair("a", &a)];
    let adamw = AdamW::new(vars(), params())?;
    let half = ClippedOptimizer::wrap_allow_unclipped(adamw, one, Clip::none(), &["*"])?;
    refused(half.save(&path));
    assert_eq!(names_in(&folder)?, [""; 0]);

    let mut opt = AdamW::from_named_vars(NamedVars::by_place(vars()), params())?;
    opt.backward_step(&(a.sqr()? + b.sqr()?)?.sum_all()?)?;
    opt.save(&path)?;
    refused(AdamW::new(vars(), params())?.load(&path));
    AdamW::from_named_vars(NamedVars::by_place(vars()), params())?.load(&path)?;
    let both = vec![pair("a", &a), pair("b", &b)];
    ClippedOptimizer::wrap(AdamW::new(vars(), params())?, both, Clip::none())?.save(&path)?;
    Ok(())
}

/// A rule with so many numbers.
#[derive(Debug)]
struct Numbers(usize);

impl candle_grad_clip::ClipRule for Numbers {
    fn decide(&self, _: &candle_grad_clip::GradNorms) -> candle_grad_clip::ClipDecision {
        candle_grad_clip::ClipDecision::Keep
    }

    fn save(&self) -> Vec<f64> {
        (0..self.0).map(|i| (i as f64).sqrt()).collect()
    }

    fn load(&mut self, state: &[f64]) -> std::result::Result<(), String> {
        let same = state == self.save();
        same.then_some(())
            .ok_or_else(|| "other numbers".to_string())
    }
}

/// Numbers of a history are 8 bytes each, not text in the header, which may have 100 MB.
/// `cargo bench -p bench --bench checkpoint` saves more of them.
#[test]
fn a_history_takes_8_bytes_a_number() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let len = 1_000_000;
    let w = Var::ones(3, DType::F32, device())?;
    let vars = vec![pair("w", &w)];
    let inner = AdamW::from_named_vars(vars.clone(), ParamsAdamW::default())?;
    let mut opt = ClippedOptimizer::wrap(inner, vars, Clip::none())?.with_rule(Numbers(len))?;
    opt.save(&path)?;
    opt.load(&path)?;
    let bytes = fs::metadata(&path)?.len();
    assert!(bytes < 8 * len as u64 + 4096, "{bytes} bytes");
    Ok(())
}
