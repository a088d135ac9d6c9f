//! Attacks for as long as you like: poisoned gradients, kills in the middle of a save, full disks, threads.
//!
//! A few seconds of them run with the other tests; for half an hour, or from another `SOAK_SEED`:
//!
//! ```console
//! SOAK_MINUTES=30 cargo test -p candle-grad-clip-tests --test process -- --ignored --nocapture --exact soak::soak
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, NonFinite};
use candle_nn::{Optimizer, ParamsAdamW, SGD};
use fastrand::Rng;
use support::checkpoints::{Folder, names_in};
use support::gradients::{all_values_of_vars, bits_of_vars, host_tensor, store_for};

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
        ("poison", poison, 200),
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

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// Rules that bound every step, and rules that let the first ones pass or bound other things.
const BOUND: [&str; 7] = [
    "norm:1",
    "norm:0.001",
    "value:0.1",
    "param-norm:0.5",
    "block-rms:0.1",
    "agc",
    "norm:1,norm_type=inf",
];
const OTHER: [&str; 9] = [
    "none",
    "auto",
    "auto:50",
    "quantile",
    "zclip",
    "zclip:warmup=2",
    "adagc",
    "skip:z=3",
    "skip:norm=5",
];

fn random_vars(rng: &mut Rng, dtype: DType) -> Result<Vec<(String, Var)>> {
    let var = |at: usize, rng: &mut Rng| -> Result<(String, Var)> {
        let side = if rng.u8(0..10) == 0 { 200 } else { 6 };
        let rank = rng.usize(1..3);
        let shape: Vec<usize> = (0..rank).map(|_| rng.usize(1..=side)).collect();
        let values: Vec<f64> = normal(rng, shape.iter().product());
        let tensor = host_tensor(&values, shape, dtype)?;
        Ok((format!("w{at}"), Var::from_tensor(&tensor)?))
    };
    (0..rng.usize(1..5)).map(|at| var(at, rng)).collect()
}

fn normal(rng: &mut Rng, n: usize) -> Vec<f64> {
    let mut one = || {
        let radius = (-2.0 * rng.f64().max(f64::MIN_POSITIVE).ln()).sqrt();
        radius * (std::f64::consts::TAU * rng.f64()).cos()
    };
    (0..n).map(|_| one()).collect()
}

/// The largest finite value, and one that is subnormal.
fn extremes(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F16 => (65504.0, 6e-8),
        DType::BF16 => (3.38e38, 1e-40),
        DType::F32 => (f64::from(f32::MAX), 1e-44),
        _ => (f64::MAX, 5e-324),
    }
}

/// What was done to the gradients of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Poison {
    None,
    /// Zero or subnormal.
    Small,
    /// Finite, and near the largest.
    Huge,
    NonFinite,
}

fn random_gradients(rng: &mut Rng, vars: &[Var], dtype: DType) -> Result<(Vec<Tensor>, Poison)> {
    let (largest, smallest) = extremes(dtype);
    let target = rng.usize(0..vars.len());
    let (poison, value) = match rng.u8(0..16) {
        0 => (Poison::NonFinite, f64::NAN),
        1 => (Poison::NonFinite, f64::INFINITY),
        2 => (Poison::NonFinite, f64::NEG_INFINITY),
        3 => (Poison::Huge, 0.9 * largest),
        4 => (Poison::Huge, -0.9 * largest),
        5 => (Poison::Small, smallest),
        6 => (Poison::Small, 0.0),
        _ => (Poison::None, 0.0),
    };
    let everywhere = rng.bool();
    let gradient = |(at, var): (usize, &Var)| {
        let mut values = normal(rng, var.elem_count());
        if at == target && poison != Poison::None {
            let n = values.len();
            if everywhere {
                values.fill(value);
            } else {
                values[rng.usize(0..n)] = value;
            }
        }
        host_tensor(&values, var.shape(), dtype)
    };
    let gradients = vars.iter().enumerate().map(gradient);
    Ok((gradients.collect::<candle_core::Result<_>>()?, poison))
}

/// Random Vars, a random rule, a random optimizer: no panic, weights that stay finite, and skipped steps that
/// change no bit.
fn poison(rng: &mut Rng) -> Result<usize> {
    let dtype = DTYPES[rng.usize(0..4)];
    let named = random_vars(rng, dtype)?;
    let vars: Vec<Var> = named.iter().map(|(_, var)| var.clone()).collect();
    let is_bound = rng.bool();
    let rules = if is_bound { &BOUND[..] } else { &OTHER };
    let rule = rules[rng.usize(0..rules.len())];
    let clip: Clip = rule.parse().with_context(|| rule.to_owned())?;
    let clip = clip.non_finite(NonFinite::SkipStep).max_skips(u32::MAX);
    let sgd = ParamsSgd {
        lr: 0.01,
        momentum: if rng.bool() { 0.9 } else { 0.0 },
        ..ParamsSgd::default()
    };
    let adamw = ParamsAdamW {
        lr: 0.01,
        ..ParamsAdamW::default()
    };
    let mut attack = Poisoned {
        rng,
        vars: &vars,
        dtype,
        is_bound,
    };
    match attack.rng.u8(0..4) {
        0 => attack.run(ClippedOptimizer::wrap(
            AdamW::named(named.clone(), adamw)?,
            named,
            clip,
        )?),
        1 => attack.run(ClippedOptimizer::wrap(
            Sgd::named(named.clone(), sgd)?,
            named,
            clip,
        )?),
        2 => attack.run(ClippedOptimizer::wrap(
            SGD::new(vars.clone(), 0.01)?,
            named,
            clip,
        )?),
        // In f16 its eps is 0.
        _ if dtype == DType::F16 => Ok(0),
        _ => attack.run(ClippedOptimizer::wrap(
            candle_nn::AdamW::new(vars.clone(), adamw)?,
            named,
            clip,
        )?),
    }
    .with_context(|| format!("{rule}, {dtype:?}"))
}

struct Poisoned<'a> {
    rng: &'a mut Rng,
    vars: &'a [Var],
    dtype: DType,
    is_bound: bool,
}

impl Poisoned<'_> {
    fn run<O: Optimizer + 'static>(&mut self, mut opt: ClippedOptimizer<O>) -> Result<usize> {
        let mut found = 0;
        for step in 0..self.rng.usize(5..40) {
            let (gradients, poison) = random_gradients(self.rng, self.vars, self.dtype)?;
            if poison == Poison::Huge && !self.is_bound {
                continue; // nothing promises that weights stay finite
            }
            found += usize::from(poison != Poison::None);
            let before = bits_of_vars(self.vars)?;
            let report = opt.step_report(&store_for(self.vars, &gradients));
            let is_same = bits_of_vars(self.vars)? == before;
            let at = || format!("step {step}, {poison:?}");
            match report {
                Ok(report) => {
                    let skipped = report.skipped()?;
                    ensure!(!skipped || is_same, "{}: skipped, but not the same", at());
                    ensure!(skipped || poison != Poison::NonFinite, "{}: taken", at());
                }
                Err(error) => {
                    ensure!(is_same, "{}: {error}, but not the same", at());
                    // A rule may refuse too many steps in a row.
                    ensure!(!self.is_bound, "{}: {error}", at());
                }
            }
            let weights = all_values_of_vars(self.vars)?;
            ensure!(
                weights.iter().all(|weight| weight.is_finite()),
                "{}: weights are not finite",
                at()
            );
        }
        Ok(found)
    }
}

/// An optimizer whose state is worth saving, over Vars of `rows` x 64.
fn trained(rows: usize) -> Result<(Vec<Var>, ClippedOptimizer<AdamW>)> {
    let var = || Var::zeros((rows, 64), DType::F32, &Device::Cpu);
    let named = vec![("a".to_owned(), var()?), ("b".to_owned(), var()?)];
    let vars = named.iter().map(|(_, var)| var.clone()).collect();
    let inner = AdamW::named(named.clone(), ParamsAdamW::default())?;
    Ok((
        vars,
        ClippedOptimizer::wrap(inner, named, Clip::auto(10.0))?,
    ))
}

fn one_step(vars: &[Var], opt: &mut ClippedOptimizer<AdamW>, rng: &mut Rng) -> Result<()> {
    let gradient = |var: &Var| host_tensor(&normal(rng, var.elem_count()), var.shape(), DType::F32);
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
    Ok(Command::new(std::env::current_exe()?)
        .args(["--ignored", "--exact", &format!("soak::{test}")])
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

/// SIGKILL at random moments of a process that does nothing but train and save: the file always loads, and the steps
/// in it never go back.
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

/// A file system of its own, with little room.
struct SmallDisk(Folder);

impl SmallDisk {
    /// None where nobody may mount one.
    fn mount() -> Result<Option<Self>> {
        let folder = Folder::new()?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "none"])
            .arg(&*folder)
            .stderr(Stdio::null())
            .status();
        let mounted = cfg!(target_os = "linux") && mounted.is_ok_and(|status| status.success());
        Ok(mounted.then_some(Self(folder)))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&*self.0).status();
    }
}

/// A save that the disk has no room for, or that finds a folder at its path: an error; what was there is there, and
/// nothing else.
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
    let file = disk.0.join("state.safetensors");
    opt.save(&file)?;
    let saved = fs::read(&file)?;
    let (filler, room) = (disk.0.join("filler"), 65536 - saved.len());
    // What is left is less than another file needs: none, or a part.
    let left = rng.usize(0..saved.len() / 2);
    fs::write(&filler, vec![1; room - left])
        .or_else(|_| fs::write(&filler, vec![1; room.saturating_sub(left + 8192)]))?;
    one_step(&vars, &mut opt, rng)?;
    ensure!(opt.save(&file).is_err(), "saved on a full disk");
    ensure!(fs::read(&file)? == saved, "the file has changed");
    let names = names_in(&disk.0)?;
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
