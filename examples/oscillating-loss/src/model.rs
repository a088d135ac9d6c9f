//! A small causal transformer that reads days and forecasts the next one, after each of them.
//!
//! ```text
//! h = Linear(features, 32)(x) + pos
//! h = h + attention(ln1(h));  h = h + mlp(ln2(h))      two blocks: 4 heads of 8, mlp of 128
//! y = Linear(32, 1)(ln_f(h))
//! ```
//! Only layers with a backward pass: `LayerNorm::forward` and `softmax_last_dim` of candle 0.11
//! have none and cut the graph without an error, so half of the model would stay untrained.
//!
//! Inside, batch and days are one dimension, `rows`, and biases are spread by `on_rows`.

#![expect(
    clippy::needless_pass_by_value,
    reason = "candle's layers take a builder by value"
)]

use std::f64::consts::SQRT_2;

use candle_core::{D, Device, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder, ops};

use crate::data::CONTEXT;

/// Width of the residual stream.
const WIDTH: usize = 32;
const HEADS: usize = 4;
const BLOCKS: usize = 2;
const MLP_WIDTH: usize = 4 * WIDTH;
const LAYER_NORM_EPS: f64 = 1e-5;

/// Inputs a day of the embedded weather.
const WEATHER_FEATURES: usize = 7;

/// The model: `[batch, days, features]` to one forecast a day, `[batch, days]`.
#[derive(Debug, Clone)]
pub struct Forecaster {
    embed: Linear,
    pos: Tensor,
    blocks: Vec<Block>,
    ln_f: LayerNorm,
    head: Linear,
    mask: Tensor,
}

impl Forecaster {
    /// The model for the embedded weather's seven inputs.
    ///
    /// # Errors
    /// If `vb` lacks a tensor or has it in another shape.
    pub fn new(vb: VarBuilder) -> Result<Self> {
        Self::with_features(WEATHER_FEATURES, vb)
    }

    /// The model for `features` inputs a day.
    ///
    /// # Errors
    /// If `vb` lacks a tensor or has it in another shape.
    pub fn with_features(features: usize, vb: VarBuilder) -> Result<Self> {
        let init = Init::Randn {
            mean: 0.0,
            stdev: 0.02,
        };
        let blocks = vb.pp("blocks");
        Ok(Self {
            embed: Linear::new(features, WIDTH, vb.pp("embed"))?,
            pos: vb.get_with_hints((CONTEXT, WIDTH), "pos", init)?,
            blocks: (0..BLOCKS)
                .map(|n| Block::new(blocks.pp(n)))
                .collect::<Result<_>>()?,
            ln_f: LayerNorm::new(vb.pp("ln_f"))?,
            head: Linear::new(WIDTH, 1, vb.pp("head"))?,
            mask: causal_mask(vb.device())?.to_dtype(vb.dtype())?,
        })
    }
}

impl Module for Forecaster {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, days, features) = x.dims3()?;
        let pos = on_rows(&self.pos, batch)?.reshape((batch * days, WIDTH))?;
        let mut h = (self.embed.forward(&x.reshape((batch * days, features))?)? + pos)?;
        for block in &self.blocks {
            h = block.forward(&h, batch, &self.mask)?;
        }
        self.head
            .forward(&self.ln_f.forward(&h)?)?
            .reshape((batch, days))
    }
}

/// Pre-norm transformer block.
#[derive(Debug, Clone)]
struct Block {
    ln1: LayerNorm,
    attn: Attention,
    ln2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Block {
    fn new(vb: VarBuilder) -> Result<Self> {
        let mlp = vb.pp("mlp");
        Ok(Self {
            ln1: LayerNorm::new(vb.pp("ln1"))?,
            attn: Attention::new(&vb.pp("attn"))?,
            ln2: LayerNorm::new(vb.pp("ln2"))?,
            fc1: Linear::new(WIDTH, MLP_WIDTH, mlp.pp("fc1"))?,
            fc2: Linear::new(MLP_WIDTH, WIDTH, mlp.pp("fc2"))?,
        })
    }

    fn forward(&self, h: &Tensor, batch: usize, mask: &Tensor) -> Result<Tensor> {
        let h = (h + self.attn.forward(&self.ln1.forward(h)?, batch, mask)?)?;
        let hidden = gelu(&self.fc1.forward(&self.ln2.forward(&h)?)?)?;
        &h + self.fc2.forward(&hidden)?
    }
}

/// softmax(q k^T / sqrt(8) + mask) v, in four heads.
#[derive(Debug, Clone)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
}

impl Attention {
    fn new(vb: &VarBuilder) -> Result<Self> {
        let square = |name| Linear::new(WIDTH, WIDTH, vb.pp(name));
        Ok(Self {
            q: square("q")?,
            k: square("k")?,
            v: square("v")?,
            o: square("o")?,
        })
    }

    fn forward(&self, x: &Tensor, batch: usize, mask: &Tensor) -> Result<Tensor> {
        let heads = |layer: &Linear| {
            let y = layer
                .forward(x)?
                .reshape((batch, (), HEADS, WIDTH / HEADS))?;
            y.transpose(1, 2)?.contiguous()
        };
        let (q, k, v) = (heads(&self.q)?, heads(&self.k)?, heads(&self.v)?);
        let scale = 1.0 / ((WIDTH / HEADS) as f64).sqrt();
        let scores = (q * scale)?.matmul(&k.t()?)?.broadcast_add(mask)?;
        let mixed = ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        self.o.forward(&mixed.transpose(1, 2)?.reshape(x.dims())?)
    }
}

/// Layer norm from operations that all have a backward pass.
#[derive(Debug, Clone)]
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(WIDTH, "weight", Init::Const(1.0))?,
            bias: vb.get_with_hints(WIDTH, "bias", Init::Const(0.0))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.dim(0)?;
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = centred.broadcast_div(&(variance + LAYER_NORM_EPS)?.sqrt()?)?;
        (normed * on_rows(&self.weight, rows)?)? + on_rows(&self.bias, rows)?
    }
}

/// x W^T + b, with `PyTorch`'s initial weights: uniform within 1 / sqrt(inputs), bias too.
#[derive(Debug, Clone)]
struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn new(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        let bound = 1.0 / (inputs as f64).sqrt();
        let init = Init::Uniform {
            lo: -bound,
            up: bound,
        };
        Ok(Self {
            weight: vb.get_with_hints((outputs, inputs), "weight", init)?,
            bias: vb.get_with_hints(outputs, "bias", init)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.matmul(&self.weight.t()?)? + on_rows(&self.bias, x.dim(0)?)?
    }
}

/// x / 2 (1 + erf(x / sqrt 2)): `gelu_erf`, whose backward pass computes erf once more.
fn gelu(x: &Tensor) -> Result<Tensor> {
    x * (x / SQRT_2)?.erf()?.affine(0.5, 0.5)?
}

/// The same values on every row, as a column of ones times these values.
///
/// `broadcast_add` would say it more plainly, but candle sums its gradient over the rows one
/// element at a time with two divisions each, which took a fifth of a training step (2-core AMD
/// EPYC VM, November 2026).
fn on_rows(values: &Tensor, rows: usize) -> Result<Tensor> {
    let ones = Tensor::ones((rows, 1), values.dtype(), values.device())?;
    ones.matmul(&values.reshape((1, ()))?)
}

/// 0 where a day may look (itself and before), minus infinity where it may not.
fn causal_mask(device: &Device) -> Result<Tensor> {
    let mask: Vec<f32> = (0..CONTEXT * CONTEXT)
        .map(|at| {
            if at % CONTEXT > at / CONTEXT {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        })
        .collect();
    Tensor::from_vec(mask, (CONTEXT, CONTEXT), device)
}
