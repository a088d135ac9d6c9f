//! Training in f16. The gradients of several micro-batches are added up in f32 and clipped once, a
//! loss scale keeps small gradients from vanishing, and f32 master weights keep updates that f16
//! would round away.
//!
//! The loss here is small, mean squares divided by a million: without a scale its f16 gradients
//! are 0, and nothing is trained. With it the run ends where f32 ends.
//!
//! `cargo run --release --example accumulate_f16`

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Clip, ClippedOptimizer, GradAccumulator, LossScaler};
use candle_nn::{
    Activation, Module, ParamsAdamW, Sequential, VarBuilder, VarMap, linear, loss, seq,
};
use fastrand::Rng;

/// The loss, in f32: its gradient starts with the scale, which is too large for f16.
fn loss(model: &Sequential, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let pred = model.forward(x)?.to_dtype(DType::F32)?;
    Ok((loss::mse(&pred, y)? * 1e-6)?)
}

fn train(dtype: DType, helped: bool) -> Result<()> {
    let mut rng = Rng::with_seed(3);
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, dtype, &Device::Cpu);
    let model = seq()
        .add(linear(2, 32, vb.pp("input"))?)
        .add(Activation::Gelu)
        .add(linear(32, 1, vb.pp("output"))?);
    seeded::init_weights(&varmap, &mut rng)?;

    let (x, y) = seeded::waves(&mut rng, 256)?; // y = sin(3 a) b
    let x = x.to_dtype(dtype)?;
    let micro_batches = [x.chunk(4, 0)?, y.chunk(4, 0)?];

    let params = ParamsAdamW {
        lr: 2e-3,
        eps: 1e-15, // far below the gradients, which are small
        ..ParamsAdamW::default()
    };
    let opt = AdamW::from_named_vars(&varmap, params)?.master_weights(helped);
    let opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1e-6))?;
    let mut opt = opt.with_loss_scaler(LossScaler::default().enabled(helped))?;
    let mut accumulator = GradAccumulator::mean(&varmap);

    let before = loss(&model, &x, &y)?.to_scalar::<f32>()? * 1e6;
    let mut skipped = 0;
    for _ in 0..300 {
        for (x, y) in micro_batches[0].iter().zip(&micro_batches[1]) {
            let loss = opt.scale_loss(&loss(&model, x, y)?)?;
            accumulator.add(&loss.backward()?)?;
        }
        let grads = accumulator.take_grads()?.context("no micro-batch")?;
        let report = opt.step_report(grads)?; // unscales, measures, clips, steps
        skipped += usize::from(report.skipped()?);
    }
    let after = loss(&model, &x, &y)?.to_scalar::<f32>()? * 1e6;
    let scale = opt.loss_scaler().map_or(1.0, LossScaler::current_scale);
    println!("    loss {before:.4} -> {after:.4}, scale {scale}, {skipped} steps skipped");
    Ok(())
}

fn main() -> Result<()> {
    println!("f16 alone:");
    train(DType::F16, false)?;
    println!("f16 with LossScaler and master_weights:");
    train(DType::F16, true)?;
    println!("f32:");
    train(DType::F32, false)
}

// Prints:
// f16 alone:
//     loss 0.1505 -> 0.1505, scale 1, 0 steps skipped
// f16 with LossScaler and master_weights:
//     loss 0.1505 -> 0.0525, scale 65536, 0 steps skipped
// f32:
//     loss 0.1505 -> 0.0525, scale 1, 0 steps skipped
