//! The shape of candle's `mnist-training`: an MLP with SGD, a convolutional net with AdamW, shuffled
//! batches, a test accuracy after each epoch.

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, NamedVars, StepPath};
use candle_nn::{
    Conv2d, Conv2dConfig, Linear, Module, Optimizer, ParamsAdamW, SGD, VarBuilder, VarMap, loss,
    ops,
};
use support::gradients::{bits_of_vars, host_tensor, random_values};
use support::oracle::assert_close;

use super::{EXACT, assert_moved, builder, mean, norm_by_hand, start, values_of, warnings};

const SIDE: usize = 12;
const CLASSES: usize = 3;
const SAMPLES: usize = 48;
const BATCH: usize = 16;

trait Model: Sized {
    fn new(vb: VarBuilder) -> candle_core::Result<Self>;
    /// `seed` picks the elements that dropout leaves out; none in a test.
    fn forward(&self, x: &Tensor, seed: Option<u64>) -> candle_core::Result<Tensor>;
}

struct Mlp {
    ln1: Linear,
    ln2: Linear,
}

impl Model for Mlp {
    fn new(vb: VarBuilder) -> candle_core::Result<Self> {
        let ln1 = candle_nn::linear(SIDE * SIDE, 20, vb.pp("ln1"))?;
        let ln2 = candle_nn::linear(20, CLASSES, vb.pp("ln2"))?;
        Ok(Self { ln1, ln2 })
    }

    fn forward(&self, x: &Tensor, _: Option<u64>) -> candle_core::Result<Tensor> {
        self.ln2.forward(&self.ln1.forward(x)?.relu()?)
    }
}

struct ConvNet {
    conv1: Conv2d,
    conv2: Conv2d,
    fc1: Linear,
    fc2: Linear,
}

impl Model for ConvNet {
    fn new(vb: VarBuilder) -> candle_core::Result<Self> {
        let conv = |inputs, outputs, size, vb| {
            candle_nn::conv2d(inputs, outputs, size, Conv2dConfig::default(), vb)
        };
        Ok(Self {
            conv1: conv(1, 4, 3, vb.pp("conv1"))?,
            conv2: conv(4, 8, 2, vb.pp("conv2"))?,
            fc1: candle_nn::linear(32, 16, vb.pp("fc1"))?,
            fc2: candle_nn::linear(16, CLASSES, vb.pp("fc2"))?,
        })
    }

    fn forward(&self, x: &Tensor, seed: Option<u64>) -> candle_core::Result<Tensor> {
        let x = x.reshape(((), 1, SIDE, SIDE))?;
        let x = x.apply(&self.conv1)?.max_pool2d(2)?;
        let x = x.apply(&self.conv2)?.max_pool2d(2)?.flatten_from(1)?;
        let mut x = x.apply(&self.fc1)?.relu()?;
        if let Some(seed) = seed {
            x = dropout(&x, seed)?;
        }
        x.apply(&self.fc2)
    }
}

/// Half of the elements, doubled. candle's own draws from a generator that can't be seeded on CPU.
fn dropout(x: &Tensor, seed: u64) -> candle_core::Result<Tensor> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mask: Vec<f64> = (0..x.elem_count())
        .map(|_| if rng.bool() { 2.0 } else { 0.0 })
        .collect();
    x * host_tensor(&mask, x.shape(), DType::F32)?
}

/// Images of horizontal, vertical or diagonal stripes under noise, and their labels.
fn images(seed: u64) -> Result<(Tensor, Tensor)> {
    let labels: Vec<u32> = (0..SAMPLES).map(|i| (i % CLASSES) as u32).collect();
    let mut all = Vec::new();
    for (i, label) in (0..).zip(&labels) {
        for (pixel, noise) in random_values(SIDE * SIDE, seed + i).iter().enumerate() {
            let (row, column) = (pixel / SIDE, pixel % SIDE);
            let across = [row, column, row + column][*label as usize];
            let stripe = if across / 2 % 2 == 0 { 0.8 } else { -0.8 };
            all.push(stripe + 0.5 * noise);
        }
    }
    let images = host_tensor(&all, (SAMPLES, SIDE * SIDE), DType::F32)?;
    Ok((images, Tensor::new(labels, &Device::Cpu)?))
}

fn loss_of(logits: &Tensor, labels: &Tensor) -> candle_core::Result<Tensor> {
    loss::nll(&ops::log_softmax(logits, D::Minus1)?, labels)
}

fn accuracy(logits: &Tensor, labels: &Tensor) -> Result<f64> {
    let same = logits.argmax(D::Minus1)?.eq(labels)?;
    Ok(f64::from(
        same.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?,
    ))
}

/// The result of a training.
#[derive(Debug, PartialEq)]
struct Trained {
    losses: Vec<f64>,
    coefs: Vec<f64>,
    test_accuracy: f64,
    weights: Vec<Vec<f64>>,
    bits: Vec<Vec<u64>>,
}

/// How a step is written: as candle's example does, or with the gradients at hand.
#[derive(Clone, Copy, PartialEq)]
enum Written {
    BackwardStep,
    /// Checks each step against the norm by hand and, with a learning rate, each weight.
    Step {
        sgd: Option<f64>,
    },
}

fn train<M: Model, O: Optimizer + 'static>(
    make: impl Fn(NamedVars) -> Result<O>,
    clip: Clip,
    written: Written,
) -> Result<Trained> {
    let map = VarMap::new();
    let model = M::new(builder(&map))?;
    start(&map)?;
    let mut opt = ClippedOptimizer::wrap(make((&map).into())?, &map, clip)?;
    let vars: Vec<Var> = opt.vars().vars().to_vec();
    let (images, labels) = images(10_000)?;
    let mut rng = fastrand::Rng::with_seed(5);
    let (mut losses, mut coefs) = (Vec::new(), Vec::new());
    for epoch in 0..10 {
        let mut batches: Vec<usize> = (0..SAMPLES / BATCH).collect();
        rng.shuffle(&mut batches);
        for (i, batch) in batches.into_iter().enumerate() {
            let x = images.narrow(0, batch * BATCH, BATCH)?;
            let labels = labels.narrow(0, batch * BATCH, BATCH)?;
            let logits = model.forward(&x, Some(100 * epoch + i as u64))?;
            let loss = loss_of(&logits, &labels)?;
            losses.push(f64::from(loss.to_scalar::<f32>()?));
            let report = match written {
                Written::BackwardStep => {
                    opt.backward_step(&loss)?;
                    opt.last_report().unwrap().clone()
                }
                Written::Step { sgd } => {
                    let grads = loss.backward()?;
                    let before = values_of(&vars)?;
                    let report = opt.step_report(&grads)?;
                    let norm = norm_by_hand(&grads, &vars)?;
                    assert_close(report.total_norm()?, norm, EXACT, "norm");
                    if let Some(lr) = sgd {
                        assert_moved(&vars, &before, &grads, lr * report.clip_coef()?)?;
                    }
                    report
                }
            };
            assert!(report.missing_grads().is_empty());
            coefs.push(report.clip_coef()?);
        }
    }
    let (images, labels) = self::images(20_000)?;
    Ok(Trained {
        losses,
        coefs,
        test_accuracy: accuracy(&model.forward(&images, None)?, &labels)?,
        weights: values_of(&vars)?,
        bits: bits_of_vars(&vars)?,
    })
}

/// The loss goes down, the clip acts in some steps and not in others, and new images are known.
fn assert_learned(run: &Trained) {
    let (first, last) = (
        mean(&run.losses[..3]),
        mean(&run.losses[run.losses.len() - 3..]),
    );
    assert!(last < 0.3 * first, "{:?}", run.losses);
    assert!(run.test_accuracy > 0.9, "{}", run.test_accuracy);
    let clipped = run.coefs.iter().filter(|coef| **coef < 1.0).count();
    assert!(clipped > 0 && clipped < run.coefs.len(), "{:?}", run.coefs);
}

#[test]
fn an_mlp_with_candles_sgd() -> Result<()> {
    let run = |written| {
        let make = |vars: NamedVars| Ok(SGD::new(vars.vars().to_vec(), 0.1)?);
        train::<Mlp, _>(make, Clip::norm(1.0), written)
    };
    let checked = run(Written::Step { sgd: Some(0.1) })?;
    assert_learned(&checked);
    assert_eq!(run(Written::BackwardStep)?, checked, "in place, and again");
    let ours = train::<Mlp, _>(
        |vars| Ok(Sgd::from_named_vars(vars, 0.1)?),
        Clip::norm(1.0),
        Written::BackwardStep,
    )?;
    assert_eq!(ours.weights, checked.weights, "the fused optimizer");
    Ok(())
}

#[test]
fn a_convolutional_net_with_adamw() -> Result<()> {
    let params = || ParamsAdamW {
        lr: 0.01,
        ..ParamsAdamW::default()
    };
    let theirs = |written| {
        let make = |vars: NamedVars| Ok(candle_nn::AdamW::new(vars.vars().to_vec(), params())?);
        train::<ConvNet, _>(make, Clip::norm(1.0), written)
    };
    let checked = theirs(Written::Step { sgd: None })?;
    assert_learned(&checked);
    assert_eq!(theirs(Written::BackwardStep)?, checked);
    let make = |vars| Ok(AdamW::from_named_vars(vars, params())?);
    let ours = train::<ConvNet, _>(make, Clip::norm(1.0), Written::Step { sgd: None })?;
    assert_eq!(ours.weights, checked.weights, "the fused optimizer");
    Ok(())
}

/// An optimizer that is made before the model has no Vars. candle's then trains nothing, and says
/// nothing; a wrapper that was given the map warns.
#[test]
fn an_optimizer_that_is_made_before_the_model_is_noticed() -> Result<()> {
    let map = VarMap::new();
    let mut early = SGD::new(map.all_vars(), 0.1)?;
    let sgd = SGD::new(map.all_vars(), 0.1)?;
    let mut opt = ClippedOptimizer::wrap(sgd, &map, Clip::norm(1.0))?;
    let model = Mlp::new(builder(&map))?;
    let before = bits_of_vars(NamedVars::from(&map).vars())?;
    let (images, labels) = images(1)?;
    let loss = loss_of(&model.forward(&images, None)?, &labels)?;
    assert!(warnings(|| Ok(early.backward_step(&loss)?))?.is_empty());
    let warnings = warnings(|| Ok(opt.backward_step(&loss)?))?;
    let names = r#"new=["ln1.bias", "ln1.weight", "ln2.bias", "ln2.weight"]"#;
    assert!(
        warnings.iter().any(|text| text.contains(names)),
        "{warnings:?}"
    );
    assert_eq!(bits_of_vars(NamedVars::from(&map).vars())?, before);
    Ok(())
}

/// `all_vars` has another order in each process, so its names say little; those of the map do.
#[test]
fn reports_name_vars_as_the_map_does() -> Result<()> {
    let map = VarMap::new();
    let model = Mlp::new(builder(&map))?;
    start(&map)?;
    let sgd = SGD::new(map.all_vars(), 0.1)?;
    let opt = ClippedOptimizer::wrap(sgd, &map, Clip::norm(1.0))?;
    let mut opt = opt.with_param_norms(true);
    let (images, labels) = images(1)?;
    let loss = loss_of(&model.forward(&images, None)?, &labels)?;
    let report = opt.backward_step_report(&loss)?;
    assert_eq!(report.path(), StepPath::InPlace);
    let names: Vec<&str> = report
        .record()?
        .param_norms
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(names, ["ln1.bias", "ln1.weight", "ln2.bias", "ln2.weight"]);
    Ok(())
}
