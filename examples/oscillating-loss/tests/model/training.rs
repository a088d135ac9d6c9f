//! Model and training: all weights learn, seeds decide, divergence and interruption end a run well.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, IndexOp, Module, Tensor};
use candle_grad_clip::Clip;
use candle_nn::VarMap;
use oscillating_loss::data::{CONTEXT, Weather};
use oscillating_loss::init;
use oscillating_loss::model::Forecaster;
use oscillating_loss::outcome::Outcome;
use oscillating_loss::run::Run;
use oscillating_loss::settings::{OptimizerKind, Settings};
use oscillating_loss::train::{Batches, Extras, train};

fn settings(clip: Clip, lr: f64) -> Settings {
    Settings {
        arm: clip.into(),
        lr,
        batch: 4,
        steps: 4,
        eval_every: 1000,
        ..Settings::default()
    }
}

fn run(settings: &Settings) -> Run {
    let weather = Weather::embedded().unwrap();
    train(
        settings,
        &weather,
        &AtomicBool::new(false),
        Extras::default(),
        |_, _| Ok(()),
    )
    .unwrap()
}

#[test]
fn every_parameter_gets_a_gradient() {
    let run = run(&settings(Clip::norm(1.0), 1e-3));
    assert!(run.missing.is_empty(), "{:?}", run.missing);
    let vars = run.weights.all_vars();
    assert_eq!(vars.len(), 39);
    assert_eq!(
        vars.iter().map(|var| var.elem_count()).sum::<usize>(),
        26_785
    );
    let initial = VarMap::new();
    Forecaster::new(init::seeded(&initial, 0, &Device::Cpu)).unwrap();
    let (initial, trained) = (
        initial.data().lock().unwrap(),
        run.weights.data().lock().unwrap(),
    );
    for (name, var) in &*trained {
        let change = (var.as_tensor() - initial[name].as_tensor())
            .unwrap()
            .abs()
            .unwrap();
        let change = change.sum_all().unwrap().to_scalar::<f32>().unwrap();
        // A softmax doesn't see what is added to all its inputs, so k's bias has the gradient zero.
        assert!(
            change > 0.0 || name.ends_with("k.bias"),
            "{name} didn't change"
        );
    }
}

#[test]
fn no_day_sees_the_days_after_it() {
    let varmap = VarMap::new();
    let model = Forecaster::new(init::seeded(&varmap, 0, &Device::Cpu)).unwrap();
    let x = Tensor::zeros((1, CONTEXT, 7), candle_core::DType::F32, &Device::Cpu).unwrap();
    let early = Tensor::zeros((1, 20, 7), candle_core::DType::F32, &Device::Cpu).unwrap();
    let late = Tensor::ones((1, 12, 7), candle_core::DType::F32, &Device::Cpu).unwrap();
    let changed = Tensor::cat(&[&early, &late], 1).unwrap();
    let forecast = |x: &Tensor| {
        model
            .forward(x)
            .unwrap()
            .i(0)
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
    };
    let (a, b) = (forecast(&x), forecast(&changed));
    assert_eq!(a[..20], b[..20]);
    assert!(
        a[20..]
            .iter()
            .zip(&b[20..])
            .all(|(a, b)| a.to_bits() != b.to_bits())
    );
}

#[test]
fn a_seed_decides_weights_and_batches() {
    let losses = |seed| {
        let run = run(&Settings {
            seed,
            ..settings(Clip::none(), 1e-4)
        });
        run.steps
            .iter()
            .map(|step| step.train_loss.to_bits())
            .collect::<Vec<_>>()
    };
    assert_eq!(losses(0), losses(0));
    assert_ne!(losses(0), losses(1));
    let batch = |seed| Batches::new(seed, 2126, 32).next().unwrap();
    assert_eq!(batch(7), batch(7));
    assert_ne!(batch(7), batch(8));
    assert!(batch(7).iter().all(|window| *window < 2126));
}

#[test]
fn the_unprotected_arm_diverges_and_clipping_survives_the_same_rate() {
    let none = run(&Settings {
        steps: 30,
        ..settings(Clip::none(), 1.0)
    });
    let why = none.diverged.as_ref().unwrap();
    assert!(why.contains("the loss is"), "{why}");
    assert!(none.steps.len() < 30);
    let outcome = Outcome::from(&none);
    let losses = (outcome.final_test_loss, outcome.best_test_loss);
    assert_eq!((losses, outcome.roughness), ((None, None), None));
    assert_eq!(outcome.clipped_fraction.to_bits(), 0f64.to_bits());

    let norm = run(&Settings {
        steps: 30,
        ..settings(Clip::norm(0.01), 1.0)
    });
    assert_eq!(norm.diverged, None);
    assert!(Outcome::from(&norm).final_test_loss.is_some());
    assert!(
        norm.steps
            .iter()
            .all(|step| step.clipped_norm <= 0.01 * (1.0 + 1e-5))
    );
}

#[test]
fn adamw_trains_too() {
    let adamw = Settings {
        optimizer: OptimizerKind::AdamW,
        steps: 20,
        ..settings(Clip::none(), 1e-2)
    };
    let run = run(&Settings {
        eval_every: 5,
        ..adamw
    });
    let losses = run.test_losses();
    assert_eq!(losses.len(), 4);
    assert!(losses[3] < 0.7 * losses[0], "{losses:?}");
}

/// Two steps by hand: with momentum the second one goes on by 0.9 of the first.
#[test]
fn momentum_carries_the_first_step_into_the_second() {
    let weights = |momentum, steps| {
        let run = run(&Settings {
            momentum,
            steps,
            ..settings(Clip::none(), 1e-4)
        });
        let vars = run.weights.data().lock().unwrap();
        vars["head.weight"].flatten_all().unwrap()
    };
    let initial = VarMap::new();
    Forecaster::new(init::seeded(&initial, 0, &Device::Cpu)).unwrap();
    let initial = initial.data().lock().unwrap()["head.weight"]
        .flatten_all()
        .unwrap();
    let first = (weights(0.0, 1) - &initial).unwrap();
    assert_eq!(
        weights(0.9, 1).to_vec1::<f32>().unwrap(),
        weights(0.0, 1).to_vec1::<f32>().unwrap()
    );
    let carried = (weights(0.9, 2) - weights(0.0, 2)).unwrap();
    let error = (carried - (&first * 0.9).unwrap()).unwrap();
    let norm = |t: &Tensor| {
        t.sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            .sqrt()
    };
    assert!(norm(&error) <= 1e-3 * norm(&first), "{error} {first}");
}

#[test]
fn an_interrupted_run_keeps_what_it_did() {
    let weather = Weather::embedded().unwrap();
    let interrupt = AtomicBool::new(false);
    let run = train(
        &settings(Clip::none(), 1e-4),
        &weather,
        &interrupt,
        Extras::default(),
        |step, _| {
            interrupt.store(step.step == 2, Ordering::Relaxed);
            Ok(())
        },
    )
    .unwrap();
    assert!(run.interrupted);
    assert_eq!(run.steps.len(), 2);
}
