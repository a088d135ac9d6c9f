//! Which limit? Measure first: train without a limit at a safe learning rate, ask
//! `NormStatistics`, and train with the limit that it suggests.
//!
//! The loss is `mean(w |e|^4)`. Its gradients grow with the cube of the error, so at a learning
//! rate that is good later on, the first steps explode. With a limit that most steps never reach,
//! they do not.
//!
//! `cargo run --release --example find_limit`

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use candle_grad_clip::loss::weighted_power;
use candle_grad_clip::{Clip, ClippedOptimizer, NormStatistics};
use candle_nn::{Activation, Module, Optimizer, SGD, VarBuilder, VarMap, linear, seq};
use fastrand::Rng;

/// Trains a new model; returns the loss of its last step, and the norms of all.
fn train(lr: f64, clip: Clip) -> Result<(f32, NormStatistics)> {
    let mut rng = Rng::with_seed(4);
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let model = seq()
        .add(linear(2, 32, vb.pp("input"))?)
        .add(Activation::Gelu)
        .add(linear(32, 1, vb.pp("output"))?);
    seeded::init_weights(&varmap, &mut rng)?;

    let opt = SGD::new(varmap.all_vars(), lr)?;
    let mut opt = ClippedOptimizer::wrap(opt, &varmap, clip)?;
    let mut norms = NormStatistics::default();
    let mut last = f32::NAN;
    for _ in 0..500 {
        let (x, y) = seeded::waves(&mut rng, 64)?; // y = sin(3 a) b
        let y = (y * 4.0)?;
        // Positive labels weigh more.
        let weight = (y.gt(0.0)?.to_dtype(DType::F32)? + 0.5)?;
        let loss = weighted_power(&model.forward(&x)?, &y, &weight, 4.0)?;
        norms.add(&opt.backward_step_report(&loss)?)?;
        last = loss.to_scalar()?;
    }
    Ok((last, norms))
}

fn main() -> Result<()> {
    println!("Measure, at a rate of 0.001:");
    let (loss, norms) = train(0.001, Clip::none())?;
    println!("    loss {loss:.3}");
    for suggestion in norms.suggest_max_norm() {
        println!("    {suggestion}");
    }
    let max_norm = norms.percentile_norm(90.0).context("no norm is finite")?;

    println!("Train at 0.05 without a limit:");
    match train(0.05, Clip::none()) {
        Ok((loss, _)) => println!("    loss {loss:.3}"),
        Err(error) => println!("    {error}"),
    }
    println!("Train at 0.05 with max_norm {max_norm:.2}:");
    let (loss, norms) = train(0.05, Clip::norm(max_norm))?;
    let clipped = 100.0 * norms.clipped_fraction();
    println!("    loss {loss:.3}, {clipped:.0} % of the steps clipped");
    Ok(())
}

// Prints:
// Measure, at a rate of 0.001:
//     loss 1.973
//     p50: max_norm 6.918e0 would clip 50 % of the steps
//     p75: max_norm 9.318e0 would clip 25 % of the steps
//     p90: max_norm 1.206e1 would clip 10 % of the steps
//     p95: max_norm 1.562e1 would clip 5 % of the steps
//     p99: max_norm 2.141e1 would clip 1 % of the steps
// Train at 0.05 without a limit:
//     gradients were not finite in 11 step(s) in a row, more than max_skips = 10: the first bad Var
//         is input.bias; the weights are as they were before the first of them; lower the learning
//         rate or look at the data
// Train at 0.05 with max_norm 12.06:
//     loss 0.070, 7 % of the steps clipped
