//! Clipping in your own loop, with the `GradStore` in hand: `clip_grad_norm` goes between
//! `backward()` and the optimizer's step. It returns the norm before clipping.
//!
//! Some of the data is bad. Every 25th batch has a label that is 1000 times too large: a clipped
//! step can't be long, whatever the label. One batch has a NaN: that is an error, and no gradient
//! has changed, so the loop can leave the batch out.
//!
//! `cargo run --release --example own_loop`

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_grad_clip::{Error, clip_grad_norm};
use candle_nn::{
    AdamW, Linear, Module, Optimizer, ParamsAdamW, SGD, VarBuilder, VarMap, linear, loss,
};
use fastrand::Rng;

/// A batch of y = a + 2 b + 3 c, good or bad.
fn batch(rng: &mut Rng, step: usize) -> Result<(Tensor, Tensor)> {
    let x = seeded::uniform(rng, (16, 3))?;
    let y = x.matmul(&Tensor::new(&[[1f32], [2.0], [3.0]], &Device::Cpu)?)?;
    let fault = match step {
        10 => f64::NAN,
        _ if step.is_multiple_of(25) => 1000.0,
        _ => 1.0,
    };
    let bad = (y.narrow(0, 0, 1)? * fault)?;
    Ok((x, Tensor::cat(&[bad, y.narrow(0, 1, 15)?], 0)?))
}

fn loss(model: &Linear, (x, y): &(Tensor, Tensor)) -> Result<Tensor> {
    Ok(loss::mse(&model.forward(x)?, y)?)
}

fn train<O: Optimizer>(config: O::Config, max_norm: f64) -> Result<()> {
    let mut rng = Rng::with_seed(2);
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let model = linear(3, 1, vb)?;
    seeded::init_weights(&varmap, &mut rng)?;

    let vars = varmap.all_vars();
    let mut opt = O::new(vars.clone(), config)?;
    let mut largest_norm = 0f64;
    for step in 1..=100 {
        let mut grads = loss(&model, &batch(&mut rng, step)?)?.backward()?;
        match clip_grad_norm(&mut grads, &vars, max_norm) {
            Ok(total_norm) => {
                opt.step(&grads)?;
                largest_norm = largest_norm.max(total_norm);
            }
            Err(Error::NonFinite { total, .. }) => {
                println!("    step {step} left out: {total} gradient values are not finite");
            }
            Err(error) => return Err(error.into()),
        }
    }
    let test = loss(&model, &batch(&mut rng, 1)?)?.to_scalar::<f32>()?;
    println!("    largest norm {largest_norm:.1}, test loss {test:.6}");
    Ok(())
}

fn main() -> Result<()> {
    let adamw = ParamsAdamW {
        lr: 0.1,
        ..ParamsAdamW::default()
    };
    println!("SGD, clipped to norm 1:");
    train::<SGD>(0.2, 1.0)?;
    println!("SGD, not clipped (an infinite limit only measures):");
    train::<SGD>(0.2, f64::INFINITY)?;
    println!("AdamW, clipped to norm 1:");
    train::<AdamW>(adamw.clone(), 1.0)?;
    println!("AdamW, not clipped:");
    train::<AdamW>(adamw, f64::INFINITY)
}

// Prints:
// SGD, clipped to norm 1:
//     step 10 left out: 4 gradient values are not finite
//     largest norm 870.1, test loss 0.037367
// SGD, not clipped (an infinite limit only measures):
//     step 10 left out: 4 gradient values are not finite
//     largest norm 870.1, test loss 728.322266
// AdamW, clipped to norm 1:
//     step 10 left out: 4 gradient values are not finite
//     largest norm 870.0, test loss 0.000290
// AdamW, not clipped:
//     step 10 left out: 4 gradient values are not finite
//     largest norm 870.6, test loss 1.063695
