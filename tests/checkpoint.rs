//! Checkpoints: a run that is saved and resumed is the run that was not, bit for bit; what does not fit is named; a save
//! that fails leaves the file that was there.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus};
use support::device::{backends, device};

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend::{self, Backend};
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NamedVars, NonFinite, NormType};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use support::checkpoints::{self, Folder, names_in};
use support::gradients::{bits_of_vars, random_values, store_for, tensor};

#[path = "checkpoint_files.rs"]
mod files;

/// What the optimizers have in common here.
trait Trains {
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
fn model() -> Result<VarMap> {
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
fn gradients(vars: &NamedVars, step: u64) -> Result<GradStore> {
    let mut store = GradStore::default();
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

fn adamw_params() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.1 + 0.2, // 0.30000000000000004
        weight_decay: 0.05,
        ..ParamsAdamW::default()
    }
}

fn momentum_params(nesterov: bool) -> ParamsSgd {
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
fn optimizer(scenario: &str, vars: &NamedVars, clip: Option<Clip>) -> Result<Box<dyn Trains>> {
    let amsgrad = scenario.starts_with("amsgrad");
    let master = scenario.ends_with("master");
    if amsgrad || ["adamw", "master"].contains(&scenario) {
        let opt = AdamW::named(vars.clone(), adamw_params())?;
        let opt = opt.amsgrad(amsgrad).master_weights(master);
        return match clip {
            Some(clip) => wrapped(opt, vars, clip),
            None => Ok(Box::new(opt)),
        };
    }
    let opt = match scenario {
        "sgd" => Sgd::named(vars.clone(), 0.01)?,
        _ => Sgd::named(vars.clone(), momentum_params(scenario != "momentum"))?,
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
fn train(
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

/// Runs one of the tests below in a new process, which then knows `folder`.
fn in_a_new_process(test: &str, folder: &Path, shell: Option<&str>) -> Result<ExitStatus> {
    let this = std::env::current_exe()?;
    let mut command = match shell {
        Some(script) => {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("{script}; exec \"$0\" \"$@\"")]);
            command.arg(this);
            command
        }
        None => Command::new(this),
    };
    command.args(["--exact", test, "--test-threads", "1"]);
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
    assert!(in_a_new_process("the_second_half_of_the_runs", &folder, None)?.success());
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

fn pair(name: &str, var: &Var) -> (String, Var) {
    (name.to_string(), var.clone())
}

fn small() -> Result<(Var, Vec<(String, Var)>)> {
    let w = Var::new(&[3f32, 4.0], device())?;
    Ok((w.clone(), vec![pair("w", &w)]))
}

#[test]
fn skips_in_a_row_are_counted_on() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let (w, named) = small()?;
    let make = |max_skips| {
        let clip = Clip::norm(1.0).max_skips(max_skips);
        ClippedOptimizer::wrap(Sgd::named(named.clone(), 0.1)?, named.clone(), clip)
    };
    let bad = store_for(
        std::slice::from_ref(&w),
        &[Tensor::new(&[f32::NAN, 0.0], device())?],
    );
    let mut opt = make(2)?;
    for _ in 0..2 {
        assert!(opt.step_report(&bad)?.skipped()?);
    }
    opt.save(&path)?;
    let mut resumed = make(100)?;
    resumed.load(&path)?;
    assert!(resumed.last_report().is_none());
    let mut last = resumed.step_report(&bad);
    if let (Ok(report), true) = (&last, device().is_cuda()) {
        assert!(report.skipped()?); // its result is here now: the next step notices
        last = resumed.step_report(&bad);
    }
    let error = last.unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooManySkips {
                skips: 3,
                max_skips: 2,
                ..
            }
        ),
        "{error}"
    );
    let good = store_for(&[w], &[Tensor::ones(2, DType::F32, device())?]);
    let launched = u64::from(device().is_cuda()); // one more, before it was noticed
    assert_eq!(resumed.step_report(&good)?.step(), 3 + launched);
    Ok(())
}

#[test]
fn hyper_parameters_and_clips_come_back_exactly() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let (_, named) = small()?;
    for lr in [
        0.1 + 0.2,
        0.0,
        5e-324,
        f64::MAX,
        1.0 / 3.0,
        1e-310,
        123_456_789.123_456_79,
    ] {
        let params = ParamsAdamW {
            lr,
            beta1: 0.0,
            beta2: 1.0 - f64::EPSILON,
            eps: lr,
            weight_decay: lr,
        };
        AdamW::named(named.clone(), params)?.save(&path)?;
        let mut opt = AdamW::named(named.clone(), ParamsAdamW::default())?;
        opt.load(&path)?;
        let got = opt.params();
        let got = [got.lr, got.beta1, got.beta2, got.eps, got.weight_decay].map(f64::to_bits);
        let expected = [lr, 0.0, 1.0 - f64::EPSILON, lr, lr].map(f64::to_bits);
        assert_eq!(got, expected);
    }
    let clips = [
        Clip::none(),
        Clip::norm(f64::INFINITY).eps(0.0),
        Clip::norm(0.1 + 0.2)
            .norm_type(NormType::P(2.0))
            .eps(5e-324),
        Clip::norm(f64::MIN_POSITIVE).norm_type(NormType::P(1.0 / 3.0)),
        Clip::norm(1.0)
            .norm_type(NormType::P(f64::INFINITY))
            .non_finite(NonFinite::Error),
        Clip::norm(1.0)
            .norm_type(NormType::L1)
            .non_finite(NonFinite::Zero),
        Clip::value(0.7)
            .norm_type(NormType::Inf)
            .non_finite(NonFinite::Propagate),
        Clip::value(f64::INFINITY).max_skips(u32::MAX),
    ];
    for clip in clips {
        let make = |clip: &Clip| {
            let opt = Sgd::named(named.clone(), 0.1)?;
            ClippedOptimizer::wrap(opt, named.clone(), clip.clone())
        };
        make(&clip)?.save(&path)?;
        let mut opt = make(&Clip::norm(3.0))?;
        opt.load(&path)?;
        assert_eq!(opt.clip(), &clip);
    }
    Ok(())
}

#[test]
fn a_file_goes_into_a_wrapper_and_out_of_one() -> Result<()> {
    let folder = Folder::new()?;
    let (w, named) = small()?;
    let bare = || AdamW::named(named.clone(), adamw_params());
    let clipped = |max_norm| ClippedOptimizer::wrap(bare()?, named.clone(), Clip::norm(max_norm));
    let mut opt = bare()?;
    for _ in 0..3 {
        opt.backward_step(&w.sqr()?.sum_all()?)?;
    }
    opt.save(folder.join("bare"))?;
    let mut into = clipped(0.5)?;
    into.backward_step(&w.sqr()?.sum_all()?)?;
    into.load(folder.join("bare"))?;
    assert_eq!(into.clip(), &Clip::norm(0.5)); // as it was
    assert_eq!(into.inner().steps(), 3);
    assert_eq!(into.backward_step_report(&w.sqr()?.sum_all()?)?.step(), 2);
    into.save(folder.join("clipped"))?;
    let mut out = bare()?;
    out.load(folder.join("clipped"))?;
    assert_eq!(out.steps(), 4);
    out.save(folder.join("again"))?;
    into.inner().save(folder.join("inner"))?;
    assert_eq!(
        fs::read(folder.join("again"))?,
        fs::read(folder.join("inner"))?
    );
    Ok(())
}

#[test]
fn the_momentum_of_the_file_decides_what_is_kept() -> Result<()> {
    let folder = Folder::new()?;
    let (w, named) = small()?;
    let plain = || Sgd::named(named.clone(), 0.1);
    let momentum = || Sgd::named(named.clone(), momentum_params(false));
    let step = |opt: &mut Sgd| opt.backward_step(&w.sqr()?.sum_all()?);
    let kinds: [&dyn Fn() -> candle_grad_clip::Result<Sgd>; 2] = [&plain, &momentum];
    for (ours, others) in [(kinds[0], kinds[1]), (kinds[1], kinds[0])] {
        let mut opt = ours()?;
        step(&mut opt)?;
        opt.save(folder.join("o"))?;
        let start = w.as_detached_tensor().copy()?;
        let mut resumed = others()?;
        step(&mut resumed)?;
        resumed.load(folder.join("o"))?;
        let mut ends = Vec::new();
        for opt in [&mut opt, &mut resumed] {
            w.set(&start)?;
            step(opt)?;
            step(opt)?;
            ends.push(bits_of_vars(std::slice::from_ref(&w))?);
        }
        assert_eq!(ends[0], ends[1]);
    }
    Ok(())
}

#[test]
fn others_can_read_the_file() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o.safetensors");
    let map = model()?;
    let vars = NamedVars::from(&map);
    let mut opt = AdamW::named(vars.clone(), adamw_params())?.master_weights(true);
    opt.step(&gradients(&vars, 3)?)?;
    opt.save(&path)?;
    let tensors = candle_core::safetensors::load(&path, device())?;
    let expected = |name: &str, dtype: DType, shape: &[usize]| {
        let tensor = &tensors[name];
        assert_eq!((tensor.dtype(), tensor.dims()), (dtype, shape), "{name}");
        tensor.clone()
    };
    let first = expected("layer0.f64.first_moment", DType::F64, &[5, 4]);
    let grad = gradients(&vars, 3)?
        .get(&map.data().lock().unwrap()["layer0.f64"])
        .unwrap()
        .clone();
    assert_eq!(
        first.to_vec2::<f64>()?,
        (grad * (1.0 - 0.9))?.to_vec2::<f64>()?
    );
    expected("layer0.f32.second_moment", DType::F32, &[5, 4]);
    expected("layer3.bf16.second_moment", DType::F32, &[2, 3, 2]);
    let master = expected("layer0.bf16.master", DType::F32, &[5, 4]);
    let weight = map.data().lock().unwrap()["layer0.bf16"].as_detached_tensor();
    assert_eq!(
        master
            .to_dtype(DType::BF16)?
            .to_dtype(DType::F32)?
            .to_vec2::<f32>()?,
        weight.to_dtype(DType::F32)?.to_vec2::<f32>()?
    );
    assert!(!tensors.contains_key("layer0.f32.master"));
    assert!(
        !tensors
            .keys()
            .any(|name| name.starts_with("layer6") || name.contains("max_second"))
    );
    Ok(())
}

#[test]
fn any_name_is_kept_but_not_two_of_one() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let names = [
        "a",
        "a.first_moment",
        "a.first_moment.master",
        "",
        ".",
        "__metadata__",
        "é\n\"\\\u{0}",
    ];
    let vars: Vec<Var> = names
        .iter()
        .map(|_| Var::new(&[1f32], device()))
        .collect::<candle_core::Result<_>>()?;
    let gradient = |i: usize| Tensor::new(&[i as f32], device());
    let grads: Vec<Tensor> = (0..vars.len())
        .map(gradient)
        .collect::<candle_core::Result<_>>()?;
    let named: Vec<(String, Var)> = names
        .iter()
        .zip(&vars)
        .map(|(name, var)| pair(name, var))
        .collect();
    let mut opt = AdamW::named(named.clone(), ParamsAdamW::default())?;
    opt.step(&store_for(&vars, &grads))?;
    opt.save(&path)?;
    let before = fs::read(&path)?;
    let mut resumed = AdamW::named(
        named.into_iter().rev().collect::<Vec<_>>(),
        ParamsAdamW::default(),
    )?;
    resumed.load(&path)?;
    let tensors = candle_core::safetensors::load(&path, device())?;
    let moment = |name: &str| tensors[&format!("{name}.first_moment")].to_vec1::<f32>();
    assert_eq!(moment("a.first_moment")?, [0.1f32]);

    let twice = vec![pair("a", &vars[0]), pair("a", &vars[1])];
    let mut opt = AdamW::named(twice, ParamsAdamW::default())?;
    for error in [opt.save(&path).unwrap_err(), opt.load(&path).unwrap_err()] {
        assert!(
            error.to_string().contains("same name")
                || error.to_string().contains("two Vars are named \"a\""),
            "{error}"
        );
    }
    assert_eq!(fs::read(&path)?, before);
    Ok(())
}

#[test]
fn a_wrapper_saves_under_its_names_also_what_inner_mut_put_in() -> Result<()> {
    let folder = Folder::new()?;
    let (w, named) = small()?;
    let make = || Sgd::new(vec![w.clone()], momentum_params(true)); // w is var.0 here
    let mut opt = ClippedOptimizer::wrap(make()?, named.clone(), Clip::none())?;
    *opt.inner_mut() = make()?;
    opt.inner_mut().backward_step(&w.sqr()?.sum_all()?)?;
    opt.save(folder.join("o"))?;
    assert!(
        candle_core::safetensors::load(folder.join("o"), device())?
            .contains_key("w.momentum_buffer")
    );
    *opt.inner_mut() = make()?;
    opt.load(folder.join("o"))?;
    assert_eq!(opt.inner().steps(), 1);
    Ok(())
}

/// What `load` says of a file that `saved` wrote, to an optimizer that then goes on as if nothing had been.
fn refusal(
    saved: &dyn Trains,
    vars: &NamedVars,
    make: &dyn Fn(&NamedVars) -> Result<Box<dyn Trains>>,
) -> Result<Error> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    saved.save(&path)?;
    let ones = |var: &Var| var.set(&var.ones_like()?);
    let mut runs = Vec::new();
    let mut error = None;
    for tries in [false, true] {
        vars.vars().iter().try_for_each(ones)?;
        let mut opt = make(vars)?;
        opt.train(&gradients(vars, 1)?)?;
        if tries {
            error = opt.load(&path).err();
        }
        opt.train(&gradients(vars, 2)?)?;
        opt.save(&folder.join("after"))?;
        runs.push((bits_of_vars(vars.vars())?, fs::read(folder.join("after"))?));
    }
    assert_eq!(runs[0], runs[1]);
    error.context("it was loaded")
}

#[test]
fn what_differs_is_named() -> Result<()> {
    let var = |shape: &[usize], dtype| Var::ones(shape, dtype, device());
    let f32 = DType::F32;
    let model = |names: &[(&str, &[usize], DType)]| -> Result<NamedVars> {
        let pairs: Vec<(String, Var)> = names
            .iter()
            .map(|(name, shape, dtype)| Ok(pair(name, &var(shape, *dtype)?)))
            .collect::<Result<_>>()?;
        Ok(pairs.into())
    };
    let here = model(&[
        ("a", &[2, 3], f32),
        ("b", &[3], f32),
        ("c", &[], f32),
        ("d", &[4], f32),
    ])?;
    let there = model(&[
        ("a", &[3, 2], f32),
        ("b", &[3], DType::BF16),
        ("c", &[], f32),
        ("e", &[4], f32),
    ])?;
    let make = |scenario: &'static str, vars: &NamedVars| -> Result<Box<dyn Trains>> {
        let mut opt = optimizer(scenario, vars, None)?;
        opt.train(&gradients(vars, 2)?)?;
        Ok(opt)
    };
    let refused = |there: &NamedVars, scenario: &'static str, ours: &'static str| {
        let make_ours = move |vars: &NamedVars| optimizer(ours, vars, Some(Clip::norm(1.0)));
        refusal(make(scenario, there)?.as_ref(), &here, &make_ours)
    };
    let differences = |error: Error| match error {
        Error::CheckpointMismatch { differences, .. } => differences,
        other => panic!("{other}"),
    };

    let error = refused(&there, "adamw", "adamw")?;
    let text = error.to_string();
    assert!(
        text.contains("is not of this optimizer, nothing was changed: "),
        "{text}"
    );
    assert_eq!(
        differences(error),
        [
            "Vars that are not in the file: \"d\"",
            "Vars that are only in the file: \"e\"",
            "other shapes: \"a\" is [3, 2] in the file, [2, 3] here",
            "other dtypes: \"b\" is bf16 in the file, f32 here",
        ]
    );
    for (there, ours, expected) in [
        (
            "sgd",
            "adamw",
            "the optimizer is Sgd in the file, AdamW here",
        ),
        (
            "adamw",
            "momentum",
            "the optimizer is AdamW in the file, Sgd here",
        ),
        (
            "adamw",
            "amsgrad",
            "amsgrad is false in the file, true here",
        ),
        (
            "amsgrad",
            "adamw",
            "amsgrad is true in the file, false here",
        ),
        (
            "master",
            "adamw",
            "master_weights is true in the file, false here",
        ),
        (
            "nesterov",
            "nesterov_master",
            "master_weights is false in the file, true here",
        ),
    ] {
        assert_eq!(differences(refused(&here, there, ours)?), [expected]);
    }
    // A dtype of the same size, whose arrays look alike.
    let there = model(&[
        ("a", &[2, 3], f32),
        ("b", &[3], DType::F16),
        ("c", &[], f32),
        ("d", &[4], f32),
    ])?;
    let expected = ["other dtypes: \"b\" is f16 in the file, f32 here"];
    assert_eq!(differences(refused(&there, "adamw", "adamw")?), expected);

    let many: Vec<(String, Var)> = (0..25)
        .map(|i| Ok(pair(&format!("v{i}"), &var(&[], f32)?)))
        .collect::<Result<_>>()?;
    let text = refused(&many.into(), "adamw", "adamw")?.to_string();
    assert!(text.contains("\"v8\", \"v9\" and 15 more"), "{text}");
    Ok(())
}

#[test]
fn the_way_a_file_is_missing_is_said() -> Result<()> {
    let folder = Folder::new()?;
    let (_, named) = small()?;
    let mut opt = AdamW::named(named, ParamsAdamW::default())?;
    let error = opt.load(folder.join("nothing")).unwrap_err();
    assert!(
        matches!(&error, Error::CheckpointIo { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    );
    assert!(
        error
            .to_string()
            .starts_with(&format!("checkpoint {}", folder.join("nothing").display())),
        "{error}"
    );
    let error = opt.load(&*folder).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
    if cfg!(unix) {
        assert!(opt.load("/dev/zero").is_err());
    }
    Ok(())
}

#[test]
fn a_save_that_cannot_be_leaves_what_is_there() -> Result<()> {
    let folder = Folder::new()?;
    let (_, named) = small()?;
    let opt = AdamW::named(named, ParamsAdamW::default())?;
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
    let mut opt = AdamW::named(vec![pair("w", &w)], ParamsAdamW::default())?;
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

/// A small disk, gone when dropped.
#[cfg(unix)]
struct Disk<'a>(&'a Path);

#[cfg(unix)]
impl<'a> Disk<'a> {
    /// None where this user can't mount one.
    fn mounted(folder: &'a Path) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]);
        let output = mount.arg(folder).output().ok()?;
        output.status.success().then_some(Self(folder))
    }
}

#[cfg(unix)]
impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).output();
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_file_whole() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("disk");
    fs::create_dir(&path)?;
    let Some(disk) = Disk::mounted(&path) else {
        println!("skipped: no small disk here (files of limited size are tested all the same)");
        return Ok(());
    };
    leaves_the_old_file_whole(disk.0, None)
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
    let opt = AdamW::named(named, ParamsAdamW::default())?;
    opt.save(folder.join("o"))?;
    let before = fs::read(folder.join("o"))?;
    let status = in_a_new_process("a_save_without_room", folder, shell)?;
    assert!(status.success(), "{status}");
    assert_eq!(fs::read(folder.join("o"))?, before);
    assert_eq!(names_in(folder)?, ["o"]);
    Ok(())
}

/// A process that is killed can't clean up: the next one does, once nobody can be writing there any more.
#[cfg(target_os = "linux")]
#[test]
fn what_a_killed_save_leaves_is_removed_after_a_day() -> Result<()> {
    use std::time::{Duration, SystemTime};
    let folder = Folder::new()?;
    let (_, named) = small()?;
    let opt = AdamW::named(named, ParamsAdamW::default())?;
    opt.save(folder.join("o"))?;
    let before = fs::read(folder.join("o"))?;
    let status = in_a_new_process("a_save_without_room", &folder, Some("ulimit -f 64"))?;
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

/// A Var that has taken fewer steps than the optimizer goes on from its own number.
#[test]
fn each_vars_own_steps_come_back() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let make = || -> Result<_> {
        let (a, b) = (Var::new(&[1f32], device())?, Var::new(&[1f32], device())?);
        let opt = AdamW::named(vec![pair("a", &a), pair("b", &b)], adamw_params())?;
        Ok((a, b, opt))
    };
    let both = |a: &Var, b: &Var| -> candle_core::Result<Tensor> { a.sum_all()? + b.sum_all()? };
    let (a, b, mut opt) = make()?;
    for _ in 0..20 {
        opt.backward_step(&a.sum_all()?)?;
    }
    opt.backward_step(&both(&a, &b)?)?;
    opt.save(&path)?;
    let (x, y, mut resumed) = make()?;
    resumed.load(&path)?;
    x.set(&a)?;
    y.set(&b)?;
    for _ in 0..3 {
        opt.backward_step(&both(&a, &b)?)?;
        resumed.backward_step(&both(&x, &y)?)?;
    }
    assert_eq!((resumed.steps(), opt.steps()), (24, 24));
    assert_eq!(x.to_vec1::<f32>()?, a.to_vec1::<f32>()?);
    assert_eq!(y.to_vec1::<f32>()?, b.to_vec1::<f32>()?);
    // The other way would not show.
    let document = |bytes: &[u8], own: serde_json::Value| {
        checkpoints::edited(bytes, |_, document| document["vars"][1]["steps"] = own)
    };
    let bytes = fs::read(&path)?;
    for (own, said) in [(0, "0 steps"), (22, "22 steps")] {
        fs::write(&path, document(&bytes, own.into())?)?;
        let error = resumed.load(&path).unwrap_err().to_string();
        assert!(
            error.contains(&format!("\"b\" has taken {said}")),
            "{error}"
        );
    }
    // As a file from before, in which one counter served all: another second half.
    fs::write(&path, document(&bytes, serde_json::Value::Null)?)?;
    resumed.load(&path)?;
    Ok(())
}
