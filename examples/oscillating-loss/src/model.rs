//! A small causal transformer that reads days and forecasts the next one, after each of them.
//!
//! ```text
//! h = Linear(features, 32)(x) + pos
//! h = h + attention(ln1(h));  h = h + mlp(ln2(h))      two blocks: 4 heads of 8, mlp of 128
//! y = Linear(32, 1)(ln_f(h))
//! ```
//! Only layers with a backward pass: `LayerNorm::forward` and `softmax_last_dim` of candle 0.11 have
//! none and cut the graph without an error, so half of the model would stay untrained.

use candle_core::{D, Device, Module, Result, Tensor};
use candle_nn::{Init, Linear, VarBuilder, ops};

use crate::data::CONTEXT;

/// Width of the residual stream.
const WIDTH: usize = 32;
const HEADS: usize = 4;
const BLOCKS: usize = 2;
const MLP_WIDTH: usize = 4 * WIDTH;
const LAYER_NORM_EPS: f32 = 1e-5;

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
            embed: linear(features, WIDTH, vb.pp("embed"))?,
            pos: vb.get_with_hints((CONTEXT, WIDTH), "pos", init)?,
            blocks: (0..BLOCKS)
                .map(|n| Block::new(blocks.pp(n)))
                .collect::<Result<_>>()?,
            ln_f: LayerNorm::new(vb.pp("ln_f"))?,
            head: linear(WIDTH, 1, vb.pp("head"))?,
            mask: causal_mask(vb.device())?,
        })
    }
}

impl Module for Forecaster {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.embed.forward(x)?.broadcast_add(&self.pos)?;
        for block in &self.blocks {
            h = block.forward(&h, &self.mask)?;
        }
        self.head
            .forward(&self.ln_f.forward(&h)?)?
            .squeeze(D::Minus1)
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
            fc1: linear(WIDTH, MLP_WIDTH, mlp.pp("fc1"))?,
            fc2: linear(MLP_WIDTH, WIDTH, mlp.pp("fc2"))?,
        })
    }

    fn forward(&self, h: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let h = (h + self.attn.forward(&self.ln1.forward(h)?, mask)?)?;
        let hidden = self.fc1.forward(&self.ln2.forward(&h)?)?.gelu_erf()?;
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
        let square = |name| linear(WIDTH, WIDTH, vb.pp(name));
        Ok(Self {
            q: square("q")?,
            k: square("k")?,
            v: square("v")?,
            o: square("o")?,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, days, _) = x.dims3()?;
        let heads = |layer: &Linear| {
            let y = layer
                .forward(x)?
                .reshape((batch, days, HEADS, WIDTH / HEADS))?;
            y.transpose(1, 2)?.contiguous()
        };
        let (q, k, v) = (heads(&self.q)?, heads(&self.k)?, heads(&self.v)?);
        let scale = 1.0 / ((WIDTH / HEADS) as f64).sqrt();
        let scores = (q.matmul(&k.t()?)? * scale)?.broadcast_add(mask)?;
        let mixed = ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        self.o
            .forward(&mixed.transpose(1, 2)?.reshape((batch, days, WIDTH))?)
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
        ops::layer_norm_slow(x, &self.weight, &self.bias, LAYER_NORM_EPS)
    }
}

/// A linear layer with `PyTorch`'s initial weights: uniform within 1 / sqrt(inputs), bias too.
fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    let bound = 1.0 / (inputs as f64).sqrt();
    let init = Init::Uniform {
        lo: -bound,
        up: bound,
    };
    let weight = vb.get_with_hints((outputs, inputs), "weight", init)?;
    let bias = vb.get_with_hints(outputs, "bias", init)?;
    Ok(Linear::new(weight, Some(bias)))
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
