//! Attacks for as long as you like: poisoned gradients, kills in the middle of a save, full disks,
//! threads.
//!
//! A few seconds of them run with the other tests; for half an hour, or from another `SOAK_SEED`:
//!
//! ```console
//! SOAK_MINUTES=30 cargo test -p candle-grad-clip-tests --test process -- --ignored --nocapture --exact soak::soak
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Once;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::{Optimizer, ParamsAdamW};
use fastrand::Rng;
use support::again::test_again;
use support::checkpoints::{Folder, SmallDisk, names_in};
use support::gradients::{host_tensor, store_for};

#[test]
fn a_few_seconds_of_everything() {
    run(Duration::from_secs(2));
}

#[test]
#[ignore = "runs for SOAK_MINUTES"]
fn soak() {
    let minutes = number("SOAK_MINUTES").unwrap_or(1.0);
    run(Duration::from_secs_f64(60.0 * minutes));
}

fn number(variable: &str) -> Option<f64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// One attack; how often it found something to attack.
type Attack = fn(&mut Rng) -> Result<usize>;

fn run(time: Duration) {
    let attacks: [(&str, Attack, usize); 4] = [
        ("poison", crate::poison::poison, 200),
        ("kill", kill, 1),
        ("disk", disk, 5),
        ("threads", threads, 1),
    ];
    let start = Instant::now();
    let mut seed = number("SOAK_SEED").unwrap_or(0.0) as u64;
    let mut done = BTreeMap::new();
    loop {
        for (name, attack, times) in &attacks {
            for _ in 0..*times {
                let _told = Told { name, seed };
                *done.entry(*name).or_insert(0) += attack(&mut Rng::with_seed(seed)).unwrap();
                seed += 1;
            }
        }
        if start.elapsed() >= time {
            break;
        }
    }
    println!("{done:?} in {:.0?}, seeds up to {seed}", start.elapsed());
}

/// Says which round it was that failed.
struct Told<'a> {
    name: &'a str,
    seed: u64,
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("in `{}`: begin with SOAK_SEED={}", self.name, self.seed);
        }
    }
}

/// An optimizer whose state is worth saving, over Vars of `rows` x 64.
fn trained(rows: usize) -> Result<(Vec<Var>, ClippedOptimizer<AdamW>)> {
    let var = || Var::zeros((rows, 64), DType::F32, &Device::Cpu);
    let named = vec![("a".to_owned(), var()?), ("b".to_owned(), var()?)];
    let vars = named.iter().map(|(_, var)| var.clone()).collect();
    let inner = AdamW::from_named_vars(named.clone(), ParamsAdamW::default())?;
    Ok((
        vars,
        ClippedOptimizer::wrap(inner, named, Clip::autoclip(10.0))?,
    ))
}

fn one_step(vars: &[Var], opt: &mut ClippedOptimizer<AdamW>, rng: &mut Rng) -> Result<()> {
    let gradient = |var: &Var| {
        host_tensor(
            &crate::poison::normal(rng, var.elem_count()),
            var.shape(),
            DType::F32,
        )
    };
    let gradients: Vec<Tensor> = vars
        .iter()
        .map(gradient)
        .collect::<candle_core::Result<_>>()?;
    Ok(opt.step(&store_for(vars, &gradients))?)
}

/// Where a child process is to work; only the attacks set it.
const CHILD: &str = "SOAK_CHILD";

/// This program again, with one of the tests below.
fn child(test: &str, folder: &Path) -> Result<Child> {
    Ok(test_again(&[], &format!("soak::{test}"))?
        .env(CHILD, folder)
        .stdout(Stdio::null())
        .spawn()?)
}

#[test]
#[ignore = "the child process of an attack"]
fn saves_until_it_is_killed() {
    let Some(folder) = std::env::var_os(CHILD).map(PathBuf::from) else {
        return;
    };
    let file = folder.join("state.safetensors");
    let (vars, mut opt) = trained(64).unwrap();
    if file.exists() {
        opt.load(&file).unwrap();
    }
    let (start, mut rng) = (Instant::now(), Rng::new());
    while start.elapsed() < Duration::from_secs(60) {
        one_step(&vars, &mut opt, &mut rng).unwrap();
        opt.save(&file).unwrap();
    }
}

/// SIGKILL at random moments of a process that does nothing but train and save: the file always
/// loads, and the steps in it never go back.
fn kill(rng: &mut Rng) -> Result<usize> {
    let folder = Folder::new()?;
    let file = folder.join("state.safetensors");
    let (kills, mut steps) = (rng.usize(1..4), 0);
    for _ in 0..kills {
        let mut child = child("saves_until_it_is_killed", &folder)?;
        let start = Instant::now();
        while !file.exists() && start.elapsed() < Duration::from_secs(20) {
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_micros(rng.u64(0..100_000)));
        let ended = child.try_wait()?;
        child.kill()?;
        child.wait()?;
        ensure!(ended.is_none(), "the child ended by itself: {ended:?}");
        let (vars, mut opt) = trained(64)?;
        opt.load(&file)?;
        let loaded = opt.inner().steps();
        ensure!(loaded >= steps.max(1), "{loaded} steps after {steps}");
        steps = loaded;
        one_step(&vars, &mut opt, rng)?;
    }
    Ok(kills)
}

/// Told once.
static NOT_MOUNTED: Once = Once::new();

/// A save that the disk has no room for, or that finds a folder at its path: an error; what was
/// there is there, and nothing else.
fn disk(rng: &mut Rng) -> Result<usize> {
    let (vars, mut opt) = trained(8)?;
    one_step(&vars, &mut opt, rng)?;

    let folder = Folder::in_memory()?;
    let taken = folder.join("taken");
    fs::create_dir(&taken)?;
    ensure!(opt.save(&taken).is_err(), "saved over a folder");
    ensure!(names_in(&folder)? == ["taken"], "{:?}", names_in(&folder)?);

    let Some(disk) = SmallDisk::mount()? else {
        NOT_MOUNTED.call_once(|| println!("no full disks: this user may not mount a tmpfs"));
        return Ok(1);
    };
    let file = disk.join("state.safetensors");
    opt.save(&file)?;
    let saved = fs::read(&file)?;
    let (filler, room) = (disk.join("filler"), 65536 - saved.len());
    // What is left is less than another file needs: none, or a part.
    let left = rng.usize(0..saved.len() / 2);
    fs::write(&filler, vec![1; room - left])
        .or_else(|_| fs::write(&filler, vec![1; room.saturating_sub(left + 8192)]))?;
    one_step(&vars, &mut opt, rng)?;
    ensure!(opt.save(&file).is_err(), "saved on a full disk");
    ensure!(fs::read(&file)? == saved, "the file has changed");
    let names = names_in(&disk)?;
    ensure!(names == ["filler", "state.safetensors"], "{names:?}");
    fs::remove_file(&filler)?;
    opt.save(&file)?;
    let (_, mut fresh) = trained(8)?;
    fresh.load(&file)?;
    ensure!(fresh.inner().steps() == 2, "{}", fresh.inner().steps());
    Ok(1)
}

#[test]
#[ignore = "the child process of an attack"]
fn trains_beside_an_evaluator() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let (vars, mut opt) = trained(1024).unwrap();
    let x = Tensor::ones((64, 1024), DType::F32, &Device::Cpu).unwrap();
    let read = vars.clone();
    let evaluator = thread::spawn(move || {
        for at in 0..100 {
            x.matmul(&read[at % 2]).unwrap();
        }
    });
    let mut rng = Rng::new();
    while !evaluator.is_finished() {
        one_step(&vars, &mut opt, &mut rng).unwrap();
    }
    evaluator.join().unwrap();
}

/// A trainer and an evaluator on the same Vars, in a process that is ended if it hangs.
fn threads(_: &mut Rng) -> Result<usize> {
    let folder = Folder::new()?;
    let mut child = child("trains_beside_an_evaluator", &folder)?;
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "{status}");
            return Ok(1);
        }
        if start.elapsed() > Duration::from_secs(60) {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("it hangs");
        }
        sleep(Duration::from_millis(10));
    }
}
