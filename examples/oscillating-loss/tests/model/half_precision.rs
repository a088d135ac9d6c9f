//! The example's model trains in f16 and bf16, and the scale of the loss finds its place.

use candle_core::{DType, Device, Module, Tensor};
use candle_grad_clip::loss::weighted_power;
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Clip, ClippedOptimizer, LossScaler};
use candle_nn::{ParamsAdamW, VarMap};
use oscillating_loss::data::{Weather, Windows};
use oscillating_loss::init;
use oscillating_loss::model::Forecaster;
use oscillating_loss::train::Batches;

const STEPS: usize = 60;

/// The loss of some windows, in f32: only the model computes in its own type.
fn loss(model: &Forecaster, windows: &Windows, indices: &[u32], dtype: DType) -> Tensor {
    let indices = Tensor::new(indices, &Device::Cpu).unwrap();
    let x = windows.x.index_select(&indices, 0).unwrap();
    let y = windows.y.index_select(&indices, 0).unwrap();
    let forecast = model.forward(&x.to_dtype(dtype).unwrap()).unwrap();
    let weight = y.abs().unwrap().affine(4.0, 1.0).unwrap();
    weighted_power(&forecast.to_dtype(DType::F32).unwrap(), &y, &weight, 4.0).unwrap()
}

/// What a training did.
struct Trained {
    /// The test loss before and after.
    losses: [f32; 2],
    /// The scale that each step began with, and whether it was skipped.
    steps: Vec<(f64, bool)>,
    scale: f64,
}

fn train(dtype: DType, scaler: LossScaler) -> Trained {
    let weather = Weather::embedded().unwrap();
    let varmap = VarMap::new();
    let vb = init::seeded(&varmap, 0, &Device::Cpu).to_dtype(dtype);
    let model = Forecaster::new(vb).unwrap();
    assert!(varmap.all_vars().iter().all(|var| var.dtype() == dtype));
    let params = ParamsAdamW {
        lr: 3e-3,
        ..ParamsAdamW::default()
    };
    let opt = AdamW::from_named_vars(&varmap, params)
        .unwrap()
        .master_weights(true);
    let opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0)).unwrap();
    let mut opt = opt.with_loss_scaler(scaler).unwrap();

    let test_windows: Vec<u32> = (0..weather.test.len() as u32).step_by(20).collect();
    let test_loss = || {
        let loss = loss(&model, &weather.test, &test_windows, dtype);
        loss.to_scalar::<f32>().unwrap()
    };
    let before = test_loss();
    let mut steps = Vec::new();
    for indices in Batches::new(0, weather.train.len(), 8).take(STEPS) {
        let scale = opt.loss_scaler().unwrap().current_scale();
        let loss = loss(&model, &weather.train, &indices, dtype);
        let report = opt.backward_step_report(&loss).unwrap();
        assert!(report.missing_grads().is_empty());
        steps.push((scale, report.skipped().unwrap()));
        for (name, var) in &*varmap.data().lock().unwrap() {
            let sum = var
                .to_dtype(DType::F32)
                .unwrap()
                .abs()
                .unwrap()
                .sum_all()
                .unwrap();
            assert!(
                sum.to_scalar::<f32>().unwrap().is_finite(),
                "{name} at {scale}"
            );
        }
    }
    Trained {
        losses: [before, test_loss()],
        steps,
        scale: opt.loss_scaler().unwrap().current_scale(),
    }
}

fn assert_learned(trained: &Trained) {
    let [before, after] = trained.losses;
    assert!(before.is_finite() && before > 1.0, "{before}");
    assert!(after < 0.2 * before, "{before} to {after}");
}

#[test]
fn f16_backs_off_from_overflows_and_recovers() {
    // Far too high a scale for the first gradients, whose norm is about 100.
    let scaler = LossScaler::default()
        .init_scale(2f64.powi(20))
        .growth_interval(8);
    let trained = train(DType::F16, scaler);
    assert_learned(&trained);
    let mut scales = trained
        .steps
        .iter()
        .map(|(scale, _)| *scale)
        .skip(1)
        .chain([trained.scale]);
    let mut good = 0;
    for (scale, skipped) in &trained.steps {
        good = if *skipped { 0 } else { good + 1 };
        let expected = match (skipped, good % 8) {
            (true, _) => scale / 2.0,
            (false, 0) => scale * 2.0,
            (false, _) => *scale,
        };
        assert_eq!(scales.next(), Some(expected));
    }
    let overflows = trained.steps.iter().filter(|(_, skipped)| *skipped).count();
    assert!(
        trained.steps[0].1 && (3..STEPS / 3).contains(&overflows),
        "{overflows}"
    );
    let lowest = trained
        .steps
        .iter()
        .map(|(scale, _)| *scale)
        .fold(f64::INFINITY, f64::min);
    assert!(
        lowest >= 1.0 && trained.scale > lowest,
        "from {lowest} to {}",
        trained.scale
    );
}

#[test]
fn bf16_never_overflows() {
    let trained = train(DType::BF16, LossScaler::default());
    assert_learned(&trained);
    let still = (65536.0, false);
    assert!(
        trained.steps.iter().all(|step| *step == still),
        "{:?}",
        trained.steps
    );
}
