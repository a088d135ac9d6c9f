//! The one line that adds clipping to a training loop, and what its report shows first: Vars that
//! get no gradient.
//!
//! `LayerNorm::forward` of candle-nn has no backward pass. The graph ends there without an error,
//! so nothing before it is trained. The report names these Vars. `ops::layer_norm_slow` computes
//! the same and has a backward pass.
//!
//! `cargo run --release --example wrap`

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::{
    AdamW, LayerNorm, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap, layer_norm,
    linear, loss, ops,
};
use fastrand::Rng;

struct Model {
    input: Linear,
    norm: LayerNorm,
    output: Linear,
    mended: bool,
}

impl Model {
    fn new(vb: &VarBuilder, mended: bool) -> Result<Self> {
        Ok(Self {
            input: linear(2, 32, vb.pp("input"))?,
            norm: layer_norm(32, 1e-5, vb.pp("norm"))?,
            output: linear(32, 1, vb.pp("output"))?,
            mended,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.input.forward(x)?;
        let hidden = if self.mended {
            let bias = self.norm.bias().context("the norm has no bias")?;
            ops::layer_norm_slow(&hidden, self.norm.weight(), bias, 1e-5)?
        } else {
            self.norm.forward(&hidden)?
        };
        Ok(self.output.forward(&hidden.relu()?)?)
    }
}

fn train(mended: bool) -> Result<()> {
    let mut rng = Rng::with_seed(1);
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let model = Model::new(&vb, mended)?;
    seeded::init_weights(&varmap, &mut rng)?;

    let (x, y) = seeded::waves(&mut rng, 256)?; // y = sin(3 a) b

    let params = ParamsAdamW {
        lr: 0.01,
        ..ParamsAdamW::default()
    };
    let opt = AdamW::new(varmap.all_vars(), params)?;
    let mut opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?; // the one line

    let before = loss::mse(&model.forward(&x)?, &y)?.to_scalar::<f32>()?;
    for _ in 0..300 {
        opt.backward_step(&loss::mse(&model.forward(&x)?, &y)?)?; // as without the wrapper
    }
    let after = loss::mse(&model.forward(&x)?, &y)?.to_scalar::<f32>()?;

    let report = opt.last_report().context("no step was taken")?;
    println!("loss {before:.4} -> {after:.4} in {} steps", report.step());
    println!("without a gradient: {:?}\n", report.missing_grads());
    Ok(())
}

fn main() -> Result<()> {
    // The library warns by `tracing`. Without a subscriber nobody sees its warnings.
    tracing_subscriber::fmt().without_time().init();

    println!("LayerNorm::forward, which cuts the graph:");
    train(false)?;
    println!("ops::layer_norm_slow:");
    train(true)
}

// Prints:
// LayerNorm::forward, which cuts the graph:
//  WARN candle_grad_clip::optimizer::missing: Vars without a gradient are not trained: is there an
//      operation without backward in front of them (LayerNorm::forward, RmsNorm::forward,
//      softmax_last_dim, rope)? missing=["input.bias", "input.weight", "norm.bias", "norm.weight"]
//      of=6
// loss 0.4148 -> 0.0327 in 300 steps
// without a gradient: ["input.bias", "input.weight", "norm.bias", "norm.weight"]
//
// ops::layer_norm_slow:
// loss 0.4148 -> 0.0034 in 300 steps
// without a gradient: []
