//! N steps, a checkpoint and N more in a new process are 2 N steps, bit for bit.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{
    Checkpoints, Clip, ClipDecision, ClipRule, ClippedOptimizer, GradAccumulator, GradNorms,
    LossScaler, NamedVars,
};
use candle_nn::{Optimizer, SGD, VarMap};
use support::checkpoints::Folder;

use crate::resume::{adamw_params, gradients, in_a_new_process, model, momentum_params};

const N: u64 = 9;

/// What the wrappers have in common here.
trait Trains {
    fn train(&mut self, grads: &GradStore) -> Result<()>;
    fn save(&self, checkpoints: &Checkpoints, step: u64, map: &VarMap) -> Result<()>;
    fn load_latest(&mut self, checkpoints: &Checkpoints, map: &mut VarMap) -> Result<u64>;
    /// The loss scale, 1 without a scaler.
    fn scale(&self) -> f64;
}

impl<O: Optimizer + 'static> Trains for ClippedOptimizer<O> {
    fn train(&mut self, grads: &GradStore) -> Result<()> {
        Ok(self.step(grads)?)
    }
    fn save(&self, checkpoints: &Checkpoints, step: u64, map: &VarMap) -> Result<()> {
        checkpoints.save(step, map, self, &step)?;
        Ok(())
    }
    fn load_latest(&mut self, checkpoints: &Checkpoints, map: &mut VarMap) -> Result<u64> {
        let loaded = checkpoints
            .load_latest(map, self)?
            .context("no checkpoint")?;
        anyhow::ensure!(loaded.state::<u64>()? == loaded.step());
        Ok(loaded.step())
    }
    fn scale(&self) -> f64 {
        self.loss_scaler().map_or(1.0, LossScaler::current_scale)
    }
}

/// Limits the norm to twice its running mean.
#[derive(Default)]
struct TwiceTheMean {
    mean: Option<f64>,
}

impl ClipRule for TwiceTheMean {
    fn decide(&self, measured: &GradNorms) -> ClipDecision {
        let most = 2.0 * self.mean.unwrap_or(f64::INFINITY);
        if measured.total_norm() > most {
            return ClipDecision::Scale(most / measured.total_norm());
        }
        ClipDecision::Keep
    }

    fn observe(&mut self, measured: &GradNorms, _: &ClipDecision) {
        let mean = self.mean.unwrap_or(measured.total_norm());
        self.mean = Some(0.9 * mean + 0.1 * measured.total_norm());
    }

    fn save(&self) -> Vec<f64> {
        self.mean.into_iter().collect()
    }

    fn load(&mut self, state: &[f64]) -> std::result::Result<(), String> {
        self.mean = state.first().copied();
        Ok(())
    }
}

/// The clips of all methods: those with a history first.
const CLIPS: [&str; 17] = [
    "auto:40",
    "auto:75,window=7",
    "quantile:0.7,rate=0.3",
    "zclip:warmup=5,z_thresh=1.5,alpha=0.8,max_norm=inf",
    "zclip:warmup=3,z_thresh=1,mode=percentile,max_norm=2",
    "zclip:warmup=4,z_thresh=1.2,mode=mean,skip=true",
    "adagc:warmup=6,beta=0.7",
    "stabilizer",
    "skip:z=1.5,window=12,max_norm=3",
    "skip:z=1.5,window=12+zclip:warmup=4,z_thresh=1,max_norm=inf+adagc:warmup=6,beta=0.7+norm:2",
    "none",
    "norm:1",
    "norm:1,norm_type=inf,max_skips=1000",
    "value:0.25",
    "param-norm:0.5",
    "block-rms:0.5",
    "agc",
];

/// The wrapper of a scenario: `adamw`, `master` and others, then a clip.
fn wrapper(scenario: &str, vars: &NamedVars, clip: Clip) -> Result<Box<dyn Trains>> {
    let adamw = || AdamW::from_named_vars(vars.clone(), adamw_params());
    let sgd = |nesterov| Sgd::from_named_vars(vars.clone(), momentum_params(nesterov));
    let vars = vars.clone();
    Ok(match scenario {
        "adamw" => Box::new(ClippedOptimizer::wrap(adamw()?, vars, clip)?),
        "amsgrad" => Box::new(ClippedOptimizer::wrap(adamw()?.amsgrad(true), vars, clip)?),
        "master" => Box::new(ClippedOptimizer::wrap(
            adamw()?.master_weights(true),
            vars,
            clip,
        )?),
        "momentum" => Box::new(ClippedOptimizer::wrap(sgd(false)?, vars, clip)?),
        "nesterov" => Box::new(ClippedOptimizer::wrap(
            sgd(true)?.master_weights(true),
            vars,
            clip,
        )?),
        "scaler" => {
            let opt = ClippedOptimizer::wrap(adamw()?.master_weights(true), vars, clip)?;
            Box::new(opt.with_loss_scaler(LossScaler::default().growth_interval(3))?)
        }
        "own_rule" => {
            let opt = ClippedOptimizer::wrap(adamw()?, vars, Clip::none().max_skips(1000))?;
            Box::new(opt.with_rule(TwiceTheMean::default())?)
        }
        "candle_sgd" => {
            let sgd = SGD::new(vars.vars().to_vec(), 0.01)?;
            Box::new(ClippedOptimizer::wrap(sgd, vars, clip)?)
        }
        _ => anyhow::bail!("no scenario {scenario}"),
    })
}

/// Takes steps. With an accumulator, each has two micro-batches.
fn train(
    opt: &mut dyn Trains,
    vars: &NamedVars,
    steps: std::ops::Range<u64>,
    accumulate: bool,
) -> Result<()> {
    let mut sums = GradAccumulator::mean(vars.clone());
    for step in steps {
        let scaled = |step| -> Result<GradStore> {
            let mut grads = gradients(vars, step)?;
            for var in vars.vars() {
                // candle's SGD fails for tensors without elements.
                if let Some(grad) = grads.remove(var).filter(|_| var.elem_count() > 0) {
                    grads.insert(var, (grad * opt.scale())?);
                }
            }
            Ok(grads)
        };
        if accumulate {
            sums.add(&scaled(step)?)?;
            sums.add(&scaled(step + 100)?)?;
            opt.train(sums.take_grads()?.context("no gradients")?)?;
        } else {
            opt.train(&scaled(step)?)?;
        }
    }
    Ok(())
}

/// Runs scenarios twice: straight on, and with a new process in the middle, which `test` is when it
/// is run again.
fn resumes(test: &str, scenarios: &[(&str, &str, bool)]) -> Result<()> {
    if let Some(folder) = std::env::var_os("CHECKPOINT_FOLDER") {
        return scenarios.iter().enumerate().try_for_each(|(i, scenario)| {
            second_half(&Path::new(&folder).join(i.to_string()), *scenario)
                .with_context(|| format!("{scenario:?}"))
        });
    }
    let folder = Folder::in_memory()?;
    for (i, &(scenario, clip, accumulate)) in scenarios.iter().enumerate() {
        let dir = folder.join(i.to_string());
        let map = model()?;
        let vars = NamedVars::from(&map);
        let mut opt = wrapper(scenario, &vars, clip.parse::<Clip>()?.max_skips(1000))
            .with_context(|| format!("{scenario} {clip}"))?;
        train(opt.as_mut(), &vars, 0..N, accumulate)?;
        opt.save(&Checkpoints::in_dir(dir.join("run"))?, N, &map)?;
        train(opt.as_mut(), &vars, N..2 * N, accumulate)?;
        opt.save(&Checkpoints::in_dir(dir.join("straight"))?, 2 * N, &map)?;
        if scenario == "scaler" {
            assert!(opt.scale() != 65536.0);
        }
    }
    let test = format!("training::resume::{test}");
    assert!(in_a_new_process(&test, &folder, None)?.success());
    for (i, scenario) in scenarios.iter().enumerate() {
        for file in ["model.safetensors", "optimizer.safetensors", "state.json"] {
            let read =
                |run: &str| fs::read(folder.join(format!("{i}/{run}/step-000018")).join(file));
            assert!(
                read("straight")? == read("run")?,
                "{scenario:?}: other {file}"
            );
        }
    }
    Ok(())
}

fn second_half(dir: &Path, (scenario, _, accumulate): (&str, &str, bool)) -> Result<()> {
    let mut map = model()?;
    let vars = NamedVars::from(&map);
    for var in vars.vars().iter().filter(|var| var.elem_count() > 0) {
        var.set(&var.ones_like()?)?;
    }
    // What is set here comes from the files.
    let mut opt = wrapper(scenario, &vars, Clip::norm(7.0))?;
    let checkpoints = Checkpoints::in_dir(dir.join("run"))?;
    assert_eq!(opt.load_latest(&checkpoints, &mut map)?, N);
    train(opt.as_mut(), &vars, N..2 * N, accumulate)?;
    opt.save(&checkpoints, 2 * N, &map)
}

#[test]
fn load_latest_resumes_bit_for_bit_adamw() -> Result<()> {
    let test = "load_latest_resumes_bit_for_bit_adamw";
    let all = ["adamw", "amsgrad", "master"];
    resumes(test, &all.map(|optimizer| (optimizer, "norm:1", false)))
}

#[test]
fn load_latest_resumes_bit_for_bit_momentum() -> Result<()> {
    let test = "load_latest_resumes_bit_for_bit_momentum";
    resumes(
        test,
        &["momentum", "nesterov"].map(|optimizer| (optimizer, "norm:1", false)),
    )
}

#[test]
fn load_latest_resumes_bit_for_bit_every_rule() -> Result<()> {
    let test = "load_latest_resumes_bit_for_bit_every_rule";
    let mut scenarios = CLIPS.map(|clip| ("master", clip, false)).to_vec();
    scenarios.push(("own_rule", "none", false));
    resumes(test, &scenarios)
}

#[test]
fn load_latest_resumes_bit_for_bit_loss_scaler() -> Result<()> {
    let test = "load_latest_resumes_bit_for_bit_loss_scaler";
    resumes(
        test,
        &[("scaler", "norm:1", false), ("scaler", "auto:40", true)],
    )
}

#[test]
fn load_latest_resumes_bit_for_bit_accumulator() -> Result<()> {
    let test = "load_latest_resumes_bit_for_bit_accumulator";
    resumes(
        test,
        &[("adamw", "norm:1", true), ("master", "auto:40", true)],
    )
}

/// candle's SGD has no state, so nothing is lost.
#[test]
fn load_latest_resumes_bit_for_bit_candle_sgd() -> Result<()> {
    let test = "load_latest_resumes_bit_for_bit_candle_sgd";
    resumes(
        test,
        &["norm:1", "auto:40", "adagc:warmup=6,beta=0.7"].map(|clip| ("candle_sgd", clip, false)),
    )
}
