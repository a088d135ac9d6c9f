//! Batch norm: running statistics are Vars of the map that get no gradient by design, and that
//! change in the forward pass, not in the step.

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Clip, ClippedOptimizer, NamedVars};
use candle_nn::{
    BatchNorm, Conv2d, Conv2dConfig, Linear, Module, ModuleT, Optimizer, ParamsAdamW, VarMap, loss,
    ops,
};
use support::gradients::{bits_of_vars, values};
use support::oracle::assert_close;

use super::{EXACT, builder, data, mean, norm_by_hand, start, values_of, warnings};

const CLASSES: usize = 2;
const SAMPLES: usize = 16;

struct Model {
    map: VarMap,
    convs: [(Conv2d, BatchNorm); 2],
    head: Linear,
}

/// The running statistics in the order of the map.
const STATISTICS: [&str; 4] = [
    "block0.bn.running_mean",
    "block0.bn.running_var",
    "block1.bn.running_mean",
    "block1.bn.running_var",
];

impl Model {
    fn new() -> Result<Self> {
        let map = VarMap::new();
        let vb = builder(&map);
        let block = |inputs, i| -> candle_core::Result<_> {
            let vb = vb.pp(format!("block{i}"));
            let config = Conv2dConfig::default();
            let conv = candle_nn::conv2d_no_bias(inputs, 4, 3, config, vb.pp("conv"))?;
            Ok((conv, candle_nn::batch_norm(4, 1e-5, vb.pp("bn"))?))
        };
        let model = Self {
            convs: [block(1, 0)?, block(4, 1)?],
            head: candle_nn::linear(4, CLASSES, vb.pp("head"))?,
            map: map.clone(),
        };
        start(&map)?;
        Ok(model)
    }

    fn forward(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let mut x = x.clone();
        for (conv, norm) in &self.convs {
            x = norm.forward_t(&conv.forward(&x)?, train)?.relu()?;
        }
        self.head.forward(&x.mean((2, 3))?)
    }

    fn loss(&self, x: &Tensor, labels: &Tensor) -> candle_core::Result<Tensor> {
        loss::nll(
            &ops::log_softmax(&self.forward(x, true)?, D::Minus1)?,
            labels,
        )
    }

    fn statistics(&self) -> Result<NamedVars> {
        Ok(NamedVars::from(&self.map).matching(&["*.running_*"])?)
    }

    fn trained(&self) -> Result<NamedVars> {
        Ok(NamedVars::from(&self.map).matching(&["*.weight", "*.bias"])?)
    }
}

/// Images of horizontal or vertical stripes under noise.
fn batch(seed: u64) -> Result<(Tensor, Tensor)> {
    const SIDE: usize = 8;
    let labels: Vec<u32> = (0..SAMPLES).map(|i| (i % CLASSES) as u32).collect();
    let rows = Tensor::arange(0f32, SIDE as f32, &Device::Cpu)?.reshape((SIDE, 1))?;
    let rows = ((rows * std::f64::consts::FRAC_PI_2)?.cos()? * 2.0)?.broadcast_as((SIDE, SIDE))?;
    let stripes = Tensor::stack(&[&rows, &rows.t()?], 0)?.unsqueeze(1)?;
    let labels = Tensor::new(labels, &Device::Cpu)?;
    let images = stripes.contiguous()?.index_select(&labels, 0)?;
    let noise = (data(seed, images.shape())? * 0.5)?;
    Ok(((images + noise)?, labels))
}

fn params() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.02,
        weight_decay: 0.1, // none of it may reach the statistics
        ..ParamsAdamW::default()
    }
}

/// The losses, the accuracy with the running statistics, and the weights.
fn train<O: Optimizer + 'static>(
    make: impl Fn(&VarMap) -> Result<O>,
) -> Result<(Vec<f64>, f64, Vec<Vec<f64>>)> {
    let model = Model::new()?;
    let opt = ClippedOptimizer::wrap(make(&model.map)?, &model.map, Clip::norm(0.5))?;
    let mut opt = opt.ignore_missing_grads(&["*.running_"]);
    let (statistics, trained) = (model.statistics()?, model.trained()?);
    assert_eq!(statistics.names(), STATISTICS);
    let mut losses = Vec::new();
    for step in 0..30 {
        let (x, labels) = batch(1000 * step)?;
        let loss = model.loss(&x, &labels)?;
        losses.push(f64::from(loss.to_scalar::<f32>()?));
        let before = bits_of_vars(statistics.vars())?;
        let grads = loss.backward()?;
        let report = opt.step_report(&grads)?;
        assert_close(
            report.total_norm()?,
            norm_by_hand(&grads, trained.vars())?,
            EXACT,
            "norm",
        );
        assert!(report.missing_grads().is_empty());
        assert_eq!(
            bits_of_vars(statistics.vars())?,
            before,
            "the step leaves them alone"
        );
    }
    let (x, labels) = batch(77)?;
    let right = model.forward(&x, false)?.argmax(D::Minus1)?.eq(&labels)?;
    let accuracy = right.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?;
    let all = values_of(NamedVars::from(&model.map).vars())?;
    Ok((losses, accuracy.into(), all))
}

#[test]
fn a_net_with_batch_norm_trains() -> Result<()> {
    let theirs = |map: &VarMap| Ok(candle_nn::AdamW::new(map.all_vars(), params())?);
    let trained = train(theirs)?;
    let (losses, accuracy, _) = &trained;
    assert!(mean(&losses[25..]) < 0.3 * losses[0], "{losses:?}");
    assert!(*accuracy > 0.9, "{accuracy}");
    assert_eq!(train(theirs)?, trained);
    let ours = train(|map| Ok(AdamW::from_named_vars(map, params())?))?;
    assert_eq!(ours, trained, "the fused optimizer");
    Ok(())
}

/// The statistics are named until they are declared; a layer that is really cut off is then still
/// seen, also beside them.
#[test]
fn statistics_are_declared_by_a_pattern_that_hides_nothing_else() -> Result<()> {
    let model = Model::new()?;
    let opt = candle_nn::AdamW::new(model.map.all_vars(), params())?;
    let mut opt = ClippedOptimizer::wrap(opt, &model.map, Clip::norm(0.5))?;
    let (x, labels) = batch(0)?;
    let seen = warnings(|| {
        let report = opt.backward_step_report(&model.loss(&x, &labels)?)?;
        assert_eq!(report.missing_grads(), STATISTICS);
        Ok(())
    })?;
    assert_eq!(seen.len(), 1, "{seen:?}");

    let mut opt = opt.ignore_missing_grads(&["*.running_"]);
    // A layer without a backward pass behind the last norm cuts off all but the head.
    let y = model.forward(&x, true)?;
    let cut = loss::nll(
        &ops::log_softmax(
            &(y.detach() + model.head.bias().unwrap().broadcast_as(y.shape())?)?,
            D::Minus1,
        )?,
        &labels,
    )?;
    let seen = warnings(|| {
        let report = opt.backward_step_report(&cut)?;
        let mut missing = model.trained()?.names().to_vec();
        missing.retain(|name| name != "head.bias");
        assert_eq!(report.missing_grads(), missing);
        assert!(missing.contains(&"block0.bn.weight".to_string()));
        Ok(())
    })?;
    assert_eq!(seen.len(), 1, "{seen:?}");
    Ok(())
}

/// A bad batch is skipped, and no weight changes. But the forward pass has put NaN into the
/// statistics already: keep a copy, and put it back when the report says that the step was skipped.
#[test]
fn a_skipped_step_leaves_nan_in_the_statistics() -> Result<()> {
    let model = Model::new()?;
    let opt = AdamW::from_named_vars(&model.map, params())?;
    let mut opt = ClippedOptimizer::wrap(opt, &model.map, Clip::norm(0.5))?;
    let (statistics, trained) = (model.statistics()?, model.trained()?);
    let (x, labels) = batch(0)?;
    opt.backward_step(&model.loss(&x, &labels)?)?;
    let evaluate = || -> Result<f64> { Ok(values(&model.forward(&x, false)?.sum_all()?)?[0]) };
    let good = evaluate()?;
    assert!(good.is_finite());

    let kept = statistics
        .vars()
        .iter()
        .map(|var| var.as_detached_tensor().copy());
    let kept = kept.collect::<candle_core::Result<Vec<Tensor>>>()?;
    let before = bits_of_vars(trained.vars())?;
    let bad = (&x * f64::NAN)?;
    let report = opt.backward_step_report(&model.loss(&bad, &labels)?)?;
    assert!(report.skipped()?);
    assert_eq!(bits_of_vars(trained.vars())?, before);
    for var in &statistics.vars()[..2] {
        let all_nan = values(var)?.iter().all(|x| x.is_nan());
        assert!(all_nan, "the forward pass wrote it");
    }
    let ruined = evaluate()?;
    assert!(
        ruined.is_finite() && ruined != good,
        "relu makes 0 of NaN, which hides it"
    );

    for (var, kept) in statistics.vars().iter().zip(&kept) {
        var.set(kept)?;
    }
    assert_eq!(evaluate()?, good);
    Ok(())
}
