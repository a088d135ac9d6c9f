//! A net to train.

use candle_core::{DType, Result, Tensor};
use candle_grad_clip::NamedVars;
use candle_nn::{Linear, Module, VarBuilder, VarMap};

use crate::device::device;
use crate::gradients::{random_values, tensor};

/// Two layers with a tanh between them and one output, their weights the same each time.
#[allow(missing_debug_implementations)] // a VarMap has none
pub struct Net {
    /// Its Vars.
    pub map: VarMap,
    /// The first layer.
    pub hidden: Linear,
    head: Linear,
}

impl Net {
    /// Of so many inputs and hidden units, with weights of about `size`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn new(dtype: DType, inputs: usize, units: usize, size: f64) -> Result<Self> {
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, dtype, device());
        let hidden = candle_nn::linear(inputs, units, vb.pp("hidden"))?;
        let head = candle_nn::linear(units, 1, vb.pp("head"))?;
        for (i, var) in NamedVars::from(&map).vars().iter().enumerate() {
            let values = random_values(var.elem_count(), i as u64);
            var.set(&(tensor(&values, var.shape(), dtype)? * size)?)?;
        }
        Ok(Self { map, hidden, head })
    }

    /// The squared error of each row of `x`, against `y`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn errors(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let hidden = self.hidden.forward(x)?.tanh()?;
        (self.head.forward(&hidden)? - y)?.sqr()
    }
}
