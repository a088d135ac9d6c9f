//! Initial weights and data from a seed, so that the programs print the same each time. candle's
//! own generator for the CPU has no seed.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_grad_clip::NamedVars;
use candle_nn::VarMap;
use fastrand::Rng;

/// Uniform numbers from -1 to 1.
///
/// # Errors
/// Those of candle.
pub fn uniform(rng: &mut Rng, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let values = (0..shape.elem_count()).map(|_| 2.0 * rng.f32() - 1.0);
    Tensor::from_vec(values.collect::<Vec<_>>(), shape, &Device::Cpu)
}

/// Data to learn: inputs `(a, b)` from -1 to 1, and `y = sin(3 a) b`.
///
/// # Errors
/// Those of candle.
pub fn waves(rng: &mut Rng, rows: usize) -> Result<(Tensor, Tensor)> {
    let x = uniform(rng, (rows, 2))?;
    let y = ((x.narrow(1, 0, 1)? * 3.0)?.sin()? * x.narrow(1, 1, 1)?)?;
    Ok((x, y))
}

/// Time series to learn: `size sin(phase + speed t)`, with sizes up to 3 and speeds from 0.5 to 0.7.
///
/// # Errors
/// Those of candle.
pub fn sines(rng: &mut Rng, rows: usize, len: usize) -> Result<Tensor> {
    let phase = (uniform(rng, (rows, 1))? * 3.0)?;
    let speed = ((uniform(rng, (rows, 1))? * 0.1)? + 0.6)?;
    let size = (uniform(rng, (rows, 1))? * 3.0)?;
    let time = Tensor::arange(0, len as u32, &Device::Cpu)?.to_dtype(DType::F32)?;
    let angle = speed.broadcast_mul(&time.unsqueeze(0)?)?;
    angle.broadcast_add(&phase)?.sin()?.broadcast_mul(&size)
}

/// Gives a new model its weights: matrices are uniform within `1 / sqrt(inputs)`, biases are 0. The
/// weights of normalization layers stay 1.
///
/// # Errors
/// Those of candle.
pub fn init_weights(varmap: &VarMap, rng: &mut Rng) -> Result<()> {
    let vars = NamedVars::from(varmap); // sorted by name; a VarMap has another order in each run
    for (name, var) in vars.names().iter().zip(vars.vars()) {
        if let &[_, inputs] = var.dims() {
            let weight = (uniform(rng, var.shape())? / (inputs as f64).sqrt())?;
            var.set(&weight.to_dtype(var.dtype())?)?;
        } else if name.ends_with("bias") {
            var.set(&var.zeros_like()?)?;
        }
    }
    Ok(())
}
