//! burn on its CPU backend, in the protocol of `../protocol.py`.
//!
//! burn clips each tensor by its own norm, so its limit is one for a tensor, and there is no
//! `total_norm`. Tensors are flattened: a module's fields have a rank known at compile time, and
//! nothing here depends on it.

use std::hint::black_box;
use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::grad_clipping::{GradientClipping, GradientClippingConfig};
use burn::module::{Module, Param};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Tensor, TensorData};
use serde::Deserialize;
use serde_json::{Value, json};

/// About how many elements are shown.
const SAMPLES: usize = 4096;
/// Parameters come from indices that no gradient has, and are small, as in a model.
const PARAMS_START: u64 = 1 << 40;
const PARAMS_SCALE: f32 = 0.0625;

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Request {
    Load {
        dtype: String,
        shapes: Vec<Vec<usize>>,
        cold_bytes: usize,
    },
    Check(Settings),
    Time {
        rounds: usize,
    },
}

#[derive(Deserialize)]
struct Settings {
    op: String,
    max_norm: f32,
    clip_value: f32,
    lr: f64,
    beta1: f32,
    beta2: f32,
    adam_eps: f32,
    weight_decay: f32,
}

#[derive(Module, Debug)]
struct Model {
    params: Vec<Param<Tensor<1>>>,
}

enum Op {
    Clip(GradientClipping),
    Step(Box<ModuleOptimizer>, f64),
}

#[derive(Default)]
struct Peer {
    lens: Vec<usize>,
    fresh: Vec<Vec<f32>>,
    other: Vec<u64>,
    grads: Vec<Tensor<1>>,
    model: Option<Model>,
    op: Option<Op>,
}

impl Peer {
    fn answer(&mut self, request: Request) -> Result<Value> {
        match request {
            Request::Load {
                dtype,
                shapes,
                cold_bytes,
            } => {
                if dtype != "f32" {
                    bail!("f32 only");
                }
                self.load(&shapes, cold_bytes);
                Ok(json!({}))
            }
            Request::Check(settings) => self.check(&settings),
            Request::Time { rounds } => {
                let times: Result<Vec<f64>> = (0..rounds).map(|_| self.time()).collect();
                Ok(json!({ "ms": times? }))
            }
        }
    }

    fn load(&mut self, shapes: &[Vec<usize>], cold_bytes: usize) {
        *self = Self::default();
        self.lens = shapes.iter().map(|shape| shape.iter().product()).collect();
        let mut start = 0;
        for len in &self.lens {
            self.fresh.push(values(start, *len, 1.0));
            start += *len as u64;
        }
        self.other = vec![1; cold_bytes / 8];
    }

    fn prepare(&mut self, settings: &Settings) -> Result<()> {
        (self.model, self.op) = (None, None);
        let norm = GradientClippingConfig::Norm(settings.max_norm);
        let optimizer = match settings.op.as_str() {
            "clip_grad_norm" => {
                self.op = Some(Op::Clip(norm.init()));
                return Ok(());
            }
            "clip_grad_value" => {
                self.op = Some(Op::Clip(GradientClipping::Value(settings.clip_value)));
                return Ok(());
            }
            "clip_adamw" => AdamWConfig::new()
                .with_beta_1(settings.beta1)
                .with_beta_2(settings.beta2)
                .with_epsilon(settings.adam_eps)
                .with_weight_decay(settings.weight_decay)
                .with_grad_clipping(Some(norm))
                .init(),
            "clip_sgd" => SgdConfig::new().with_gradient_clipping(Some(norm)).init(),
            other => bail!("burn has no {other}"),
        };
        self.op = Some(Op::Step(Box::new(optimizer), settings.lr));
        let device = Device::default().autodiff();
        let mut start = PARAMS_START;
        let mut params = Vec::new();
        for len in &self.lens {
            let data = TensorData::new(values(start, *len, PARAMS_SCALE), [*len]);
            params.push(Param::from_data(data, &device));
            start += *len as u64;
        }
        self.model = Some(Model { params });
        Ok(())
    }

    /// What a backward pass leaves: new tensors.
    fn set_grads(&mut self, scale: f32) {
        let device = Device::default();
        self.grads.clear();
        for fresh in &self.fresh {
            let data = fresh.iter().map(|x| x * scale).collect();
            let grad = Tensor::from_data(TensorData::new(data, [fresh.len()]), &device);
            self.grads.push(grad);
        }
    }

    /// Runs the operation, and returns the time that took in milliseconds.
    fn run(&mut self) -> Result<f64> {
        let grads = std::mem::take(&mut self.grads);
        match self.op.as_mut().context("nothing is prepared")? {
            Op::Clip(clip) => {
                let start = Instant::now();
                self.grads = grads.into_iter().map(|g| clip.clip_gradient(g)).collect();
                Ok(start.elapsed().as_secs_f64() * 1e3)
            }
            Op::Step(optimizer, lr) => {
                let model = self.model.take().context("no model")?;
                // Backward leaves gradients in such a map.
                let mut by_param = GradientsParams::new();
                for (param, grad) in model.params.iter().zip(grads) {
                    by_param.register(param.id, grad);
                }
                let start = Instant::now();
                self.model = Some(optimizer.step(*lr, model, by_param));
                Ok(start.elapsed().as_secs_f64() * 1e3)
            }
        }
    }

    fn time(&mut self) -> Result<f64> {
        self.set_grads(1.0);
        black_box(black_box(&self.other).iter().sum::<u64>());
        self.run()
    }

    fn check(&mut self, settings: &Settings) -> Result<Value> {
        self.prepare(settings)?;
        self.set_grads(1.0);
        self.run()?;
        if self.model.is_some() {
            self.set_grads(0.5);
            self.run()?;
        }
        let after: Vec<Tensor<1>> = match &self.model {
            Some(model) => model.params.iter().map(Param::val).collect(),
            None => self.grads.clone(),
        };
        let mut flat: Vec<f32> = Vec::new();
        for tensor in after {
            flat.extend(tensor.into_data().iter::<f32>());
        }
        let stride = (flat.len() / SAMPLES).max(1);
        Ok(json!({
            "norm": null,
            "sum": flat.iter().map(|x| f64::from(*x)).sum::<f64>(),
            "samples": flat.iter().step_by(stride).collect::<Vec<_>>(),
        }))
    }
}

/// Numbers in [-scale, scale) for the indices from `start`: the top 24 bits of splitmix64, exact in
/// f32.
fn values(start: u64, len: usize, scale: f32) -> Vec<f32> {
    (start..start + len as u64)
        .map(|index| {
            let mut z = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            ((z >> 40) as f32 * 2f32.powi(-23) - 1.0) * scale
        })
        .collect()
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip_while(|arg| arg != "--threads");
    if let Some(threads) = args.nth(1) {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.parse()?)
            .build_global()?;
    }
    let mut out = std::io::stdout().lock();
    let hello = json!({
        "peer": "burn",
        "version": "burn 0.22.1 (flex)",
        "ops": ["clip_grad_norm", "clip_grad_value", "clip_adamw", "clip_sgd"],
        "dtypes": ["f32"],
        "clips_each_tensor": true,
    });
    writeln!(out, "{hello}")?;
    let mut peer = Peer::default();
    for line in std::io::stdin().lock().lines() {
        let answer = serde_json::from_str(&line?)
            .map_err(Into::into)
            .and_then(|request| peer.answer(request))
            .unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}
