//! Our training run beside `PyTorch`'s: the same data, initial weights and batches, 200 steps of
//! `clip_grad_norm_(1.0)` and SGD, and of the same and `AdamW`. `pytorch/train.py` wrote the
//! reference.
//!
//! Largest differences seen (2026-11-23, 2-core AMD EPYC VM): loss 3e-7 (SGD) and 6e-6 (`AdamW`)
//! over 200 steps, `total_norm` 2e-6 and 7e-5, final weights 3e-7 and 2e-6, keys' biases 8e-4.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Once;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::{Optimizer, ParamsAdamW, VarBuilder, VarMap};
use oscillating_loss::data::{Weather, Windows};
use oscillating_loss::model::Forecaster;
use oscillating_loss::train::batch_loss;

const POWER: f64 = 4.0;
const ALPHA: f64 = 4.0;
const MAX_NORM: f64 = 1.0;
const SGD_LR: f64 = 3e-3;

/// Relative tolerances: rounding differs from the first step on and grows with training.
const FIRST_STEPS: (usize, f64) = (10, 1e-5);
const ALL_STEPS: (usize, f64) = (200, 1e-3);
/// Of final weights: distance of two tensors over the norm of `PyTorch`'s.
const FINAL_WEIGHTS: f64 = 1e-4;
/// Of the keys' biases: their gradient is 0 (softmax ignores a shift of all scores), so what
/// reaches the optimizer is rounding noise, of which `AdamW` makes steps of full size.
const FINAL_KEY_BIASES: f64 = 1e-2;

/// candle splits even this model's small products over all cores, unless told otherwise in this
/// way.
static ONE_THREAD: Once = Once::new();

struct Reference(HashMap<String, Tensor>);

impl Reference {
    fn load() -> Result<Self> {
        ONE_THREAD.call_once(|| {
            // SAFETY: all of this program reads the environment through `std`, which locks it.
            unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
        });
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("pytorch/reference.safetensors");
        Ok(Self(candle_core::safetensors::load(path, &Device::Cpu)?))
    }

    fn tensor(&self, name: &str) -> &Tensor {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("the reference has no {name}"))
    }

    fn values(&self, name: &str) -> Result<Vec<f64>> {
        values(self.tensor(name))
    }

    /// The tensors under a prefix, by the rest of their names.
    fn under(&self, prefix: &str) -> Vec<(&str, &Tensor)> {
        let mut found: Vec<_> = self
            .0
            .iter()
            .filter_map(|(name, t)| Some((name.strip_prefix(prefix)?, t)))
            .collect();
        found.sort_by_key(|(name, _)| *name);
        found
    }

    /// A model with the initial weights, and its Vars.
    fn model(&self) -> Result<(Forecaster, VarMap)> {
        let varmap = VarMap::new();
        let initial = self.under("init.");
        for (name, weights) in &initial {
            let var = Var::from_tensor(weights)?;
            varmap
                .data()
                .lock()
                .unwrap()
                .insert((*name).to_owned(), var);
        }
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let model = Forecaster::new(vb)?;
        assert_eq!(
            varmap.all_vars().len(),
            initial.len(),
            "Vars that PyTorch does not have"
        );
        Ok((model, varmap))
    }
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// Loss before each step and `total_norm` of each step, of a run over the reference's batches.
fn train<O: Optimizer + 'static>(
    reference: &Reference,
    make: impl FnOnce(Vec<Var>) -> candle_core::Result<O>,
) -> Result<(Vec<f64>, Vec<f64>, VarMap)> {
    let windows = Weather::embedded()?.train;
    let (model, varmap) = reference.model()?;
    let inner = make(varmap.all_vars())?;
    let mut optimizer = ClippedOptimizer::wrap(inner, &varmap, Clip::norm(MAX_NORM))?;
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for indices in reference.tensor("batches").to_vec2::<u32>()? {
        let loss = batch_loss(&model, &windows, &indices, POWER, ALPHA)?;
        losses.extend(values(&loss)?);
        let report = optimizer.backward_step_report(&loss)?;
        assert!(
            report.missing_grads().is_empty(),
            "no gradient for {:?}",
            report.missing_grads()
        );
        norms.push(report.total_norm()?);
    }
    Ok((losses, norms, varmap))
}

/// The largest relative difference, or NaN if there is one.
fn worst(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let differences = ours
        .iter()
        .zip(theirs)
        .map(|(a, b)| (a - b).abs() / b.abs());
    differences.fold(
        0.0,
        |worst, d| if d.is_nan() || d > worst { d } else { worst },
    )
}

fn assert_run_matches(
    reference: &Reference,
    name: &str,
    (losses, norms, varmap): &(Vec<f64>, Vec<f64>, VarMap),
) -> Result<()> {
    for (what, ours) in [("loss", losses), ("total_norm", norms)] {
        let theirs = reference.values(&format!("{name}.{what}"))?;
        for (steps, tolerance) in [FIRST_STEPS, ALL_STEPS] {
            let difference = worst(&ours[..steps], &theirs[..steps]);
            println!("{name} {what}, first {steps} steps: {difference:.1e}");
            assert!(
                difference <= tolerance,
                "{name} {what}, {steps} steps: {difference:e}"
            );
        }
    }
    let finals = reference.under(&format!("{name}.final."));
    let vars = varmap.data().lock().unwrap();
    assert_eq!(finals.len(), vars.len());
    for (var, theirs) in finals {
        let theirs = values(theirs)?;
        let ours = values(&vars[var])?;
        let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
        let distance = norm(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b))
            / norm(&mut theirs.iter().copied());
        println!("{name} {var}: {distance:.1e}");
        let tolerance = if var.ends_with(".attn.k.bias") {
            FINAL_KEY_BIASES
        } else {
            FINAL_WEIGHTS
        };
        assert!(distance <= tolerance, "{name} {var}: {distance:e}");
    }
    Ok(())
}

#[test]
fn windows_are_the_ones_of_pytorch() -> Result<()> {
    let reference = Reference::load()?;
    let weather = Weather::embedded()?;
    let sums = |windows: &Windows| -> Result<Vec<f64>> {
        let (x, y) = (
            windows.x.to_dtype(DType::F64)?,
            windows.y.to_dtype(DType::F64)?,
        );
        values(&(x.sum((1, 2))? + y.sum(1)?)?)
    };
    for (windows, part) in [(&weather.train, "train"), (&weather.test, "test")] {
        let (ours, theirs) = (
            sums(windows)?,
            reference.values(&format!("data.{part}_sums"))?,
        );
        assert_eq!(ours.len(), theirs.len(), "windows to {part} on");
        for (window, (a, b)) in ours.iter().zip(&theirs).enumerate() {
            assert!((a - b).abs() <= 1e-9, "{part} window {window}: {a} {b}");
        }
    }
    for (ours, name) in [
        (&weather.train.x, "data.first_x"),
        (&weather.train.y, "data.first_y"),
    ] {
        assert_eq!(values(&ours.get(0)?)?, reference.values(name)?, "{name}");
    }
    Ok(())
}

#[test]
fn sgd_follows_pytorch() -> Result<()> {
    let reference = Reference::load()?;
    let run = train(&reference, |vars| Sgd::new_lr(vars, SGD_LR))?;
    assert_run_matches(&reference, "sgd", &run)
}

#[test]
fn adamw_follows_pytorch() -> Result<()> {
    let reference = Reference::load()?;
    let run = train(&reference, |vars| AdamW::new(vars, ParamsAdamW::default()))?;
    assert_run_matches(&reference, "adamw", &run)
}
