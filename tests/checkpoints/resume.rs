//! Checkpoints: a run that is saved and resumed is the run that was not, bit for bit; what does not
//! fit is named; a save that fails leaves the file that was there.

use std::fs;
use std::path::Path;
use std::process::ExitStatus;

use support::again::test_again;
use support::device::{backends, device};

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Var};
use candle_grad_clip::backend::{self, Backend};
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, NamedVars};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use support::checkpoints::{Folder, names_in};
use support::gradients::{empty_store, random_values, tensor};

/// What the optimizers have in common here.
pub(super) trait Trains {
    fn train(&mut self, grads: &GradStore) -> Result<()>;
    fn save(&self, path: &Path) -> candle_grad_clip::Result<()>;
    fn load(&mut self, path: &Path) -> candle_grad_clip::Result<()>;
}

macro_rules! trains {
    ($($t:ty),*) => {$(
        impl Trains for $t {
            fn train(&mut self, grads: &GradStore) -> Result<()> {
                Ok(self.step(grads)?)
            }
            fn save(&self, path: &Path) -> candle_grad_clip::Result<()> {
                self.save(path)
            }
            fn load(&mut self, path: &Path) -> candle_grad_clip::Result<()> {
                self.load(path)
            }
        }
    )*};
}
trains!(AdamW, Sgd, ClippedOptimizer<AdamW>, ClippedOptimizer<Sgd>);

fn dtypes() -> [DType; 4] {
    [DType::F32, DType::F64, DType::F16, DType::BF16]
}

/// Vars of all dtypes and of some shapes, the same each time.
pub(super) fn model() -> Result<VarMap> {
    let shapes: [&[usize]; 7] = [&[5, 4], &[7], &[], &[2, 3, 2], &[33], &[0, 3], &[3]];
    let map = VarMap::new();
    {
        let mut data = map.data().lock().unwrap();
        for (i, shape) in shapes.iter().enumerate() {
            for dtype in dtypes() {
                let values = random_values(shape.iter().product(), 50 + i as u64);
                let var = Var::from_tensor(&tensor(&values, *shape, dtype)?)?;
                data.insert(format!("layer{i}.{}", dtype.as_str()), var);
            }
        }
    }
    Ok(map)
}

/// The gradients of a step: some Vars get none in some steps, some only late, some never.
pub(super) fn gradients(vars: &NamedVars, step: u64) -> Result<GradStore> {
    let mut store = empty_store()?;
    for (i, (var, name)) in vars.vars().iter().zip(vars.names()).enumerate() {
        let late = name.starts_with("layer4") && step < N + 2;
        if late || name.starts_with("layer6") || (step + i as u64).is_multiple_of(4) {
            continue;
        }
        let gain = [1.0, 1e-3, 30.0, 0.5][step as usize % 4];
        let values = random_values(var.elem_count(), 1000 * step + i as u64);
        let values: Vec<f64> = values.iter().map(|x| gain * x).collect();
        store.insert(var, tensor(&values, var.shape(), var.dtype())?);
    }
    Ok(store)
}

pub(super) fn adamw_params() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.1 + 0.2, // 0.30000000000000004
        weight_decay: 0.05,
        ..ParamsAdamW::default()
    }
}

pub(super) fn momentum_params(nesterov: bool) -> ParamsSgd {
    ParamsSgd {
        lr: 0.013,
        momentum: 0.9,
        dampening: if nesterov { 0.0 } else { 0.3 },
        weight_decay: 0.01,
        nesterov,
    }
}

fn wrapped<O: Optimizer + 'static>(
    inner: O,
    vars: &NamedVars,
    clip: Clip,
) -> Result<Box<dyn Trains>>
where
    ClippedOptimizer<O>: Trains,
{
    Ok(Box::new(ClippedOptimizer::wrap(inner, vars.clone(), clip)?))
}

const SCENARIOS: [&str; 8] = [
    "adamw",
    "amsgrad",
    "master",
    "amsgrad_master",
    "sgd",
    "momentum",
    "nesterov",
    "nesterov_master",
];

/// The optimizer of a scenario, alone or clipped.
pub(super) fn optimizer(
    scenario: &str,
    vars: &NamedVars,
    clip: Option<Clip>,
) -> Result<Box<dyn Trains>> {
    let amsgrad = scenario.starts_with("amsgrad");
    let master = scenario.ends_with("master");
    if amsgrad || ["adamw", "master"].contains(&scenario) {
        let opt = AdamW::from_named_vars(vars.clone(), adamw_params())?;
        let opt = opt.amsgrad(amsgrad).master_weights(master);
        return match clip {
            Some(clip) => wrapped(opt, vars, clip),
            None => Ok(Box::new(opt)),
        };
    }
    let opt = match scenario {
        "sgd" => Sgd::from_named_vars(vars.clone(), 0.01)?,
        _ => Sgd::from_named_vars(vars.clone(), momentum_params(scenario != "momentum"))?,
    };
    let opt = opt.master_weights(master);
    match clip {
        Some(clip) => wrapped(opt, vars, clip),
        None => Ok(Box::new(opt)),
    }
}

/// Steps before the checkpoint, and after it.
const N: u64 = 7;

/// Takes steps. A clipped run has a bad batch right before the checkpoint.
pub(super) fn train(
    opt: &mut dyn Trains,
    vars: &NamedVars,
    steps: std::ops::Range<u64>,
    clipped: bool,
) -> Result<()> {
    for step in steps {
        let mut grads = gradients(vars, step)?;
        if clipped && step == N - 1 {
            let (var, name) = (&vars.vars()[1], &vars.names()[1]);
            anyhow::ensure!(name == "layer0.f16", "{name}");
            grads.insert(var, (var.as_tensor() / 0.0)?);
        }
        opt.train(&grads)?;
    }
    Ok(())
}

/// A run of a scenario: its files go by this name.
fn runs() -> Vec<(String, &'static str, Option<Clip>, Backend)> {
    let clips = [None, Some(Clip::norm(1.0)), Some(Clip::value(0.25))];
    let mut runs = Vec::new();
    for backend in backends() {
        for scenario in SCENARIOS {
            for clip in &clips {
                let clipped = clip
                    .as_ref()
                    .map_or_else(|| "bare".to_string(), Clip::to_string);
                let name = format!("{scenario}-{}-{backend:?}", clipped.replace(':', ""));
                runs.push((name, scenario, clip.clone(), backend));
            }
        }
    }
    runs
}

/// Runs a test in a new process, which then knows `folder`.
pub(super) fn in_a_new_process(
    test: &str,
    folder: &Path,
    shell: Option<&str>,
) -> Result<ExitStatus> {
    let script = shell.map(|script| format!("{script}; exec \"$0\" \"$@\""));
    let mut command = match &script {
        Some(script) => test_again(&["sh", "-c", script], test)?,
        None => test_again(&[], test)?,
    };
    command.env("CHECKPOINT_FOLDER", folder).current_dir(folder);
    let output = command.output()?;
    if !output.status.success() && shell.is_none() {
        print!("{}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(output.status)
}

#[test]
fn a_run_resumed_in_a_new_process_ends_with_the_same_bits() -> Result<()> {
    let folder = Folder::new()?;
    for (name, scenario, clip, backend) in runs() {
        backend::with_backend(backend, || -> Result<()> {
            let map = model()?;
            let vars = NamedVars::from(&map);
            let mut opt = optimizer(scenario, &vars, clip.clone())?;
            train(opt.as_mut(), &vars, 0..N, clip.is_some())?;
            map.save(folder.join(format!("{name}.weights")))?;
            opt.save(&folder.join(format!("{name}.optimizer")))?;
            train(opt.as_mut(), &vars, N..2 * N, clip.is_some())?;
            map.save(folder.join(format!("{name}.straight.weights")))?;
            opt.save(&folder.join(format!("{name}.straight.optimizer")))?;
            Ok(())
        })
        .context(name)?;
    }
    assert!(in_a_new_process("resume::the_second_half_of_the_runs", &folder, None)?.success());
    for (name, ..) in runs() {
        for file in ["weights", "optimizer"] {
            let straight = fs::read(folder.join(format!("{name}.straight.{file}")))?;
            let resumed = fs::read(folder.join(format!("{name}.resumed.{file}")))?;
            assert!(straight == resumed, "{name}: other {file}");
        }
    }
    let files = names_in(&folder)?;
    assert_eq!(files.len(), 6 * runs().len(), "{files:?}");
    Ok(())
}

/// Nothing, unless the test above runs it. All that is set here comes from the files.
#[test]
fn the_second_half_of_the_runs() -> Result<()> {
    if std::env::var_os("CHECKPOINT_FOLDER").is_none() {
        return Ok(());
    }
    for (name, scenario, clip, backend) in runs() {
        backend::with_backend(backend, || -> Result<()> {
            let mut map = model()?;
            let vars = NamedVars::from(&map);
            for var in vars.vars().iter().filter(|var| var.elem_count() > 0) {
                var.set(&var.ones_like()?)?;
            }
            map.load(format!("{name}.weights"))?;
            let other_clip = clip.as_ref().map(|_| Clip::norm(7.0).max_skips(0));
            let mut opt = optimizer(scenario, &vars, other_clip)?;
            opt.load(Path::new(&format!("{name}.optimizer")))?; // a path without a folder
            train(opt.as_mut(), &vars, N..2 * N, clip.is_some())?;
            map.save(format!("{name}.resumed.weights"))?;
            opt.save(Path::new(&format!("{name}.resumed.optimizer")))?;
            Ok(())
        })
        .context(name)?;
    }
    Ok(())
}

pub(crate) fn pair(name: &str, var: &Var) -> (String, Var) {
    (name.to_string(), var.clone())
}

pub(super) fn small() -> Result<(Var, Vec<(String, Var)>)> {
    let w = Var::new(&[3f32, 4.0], device())?;
    Ok((w.clone(), vec![pair("w", &w)]))
}
