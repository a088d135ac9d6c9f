//! The other frameworks' own tests of clipping, ported by hand, and their results, as data.
//!
//! There is one file per framework. The name of a ported test starts with its case: `t1`... for
//! PyTorch, and for TensorFlow `v` (value), `n` (norm) or `g` (global norm). Cases without an
//! equivalent here are left out: bounds that differ by sign or element (V2, V3) or have a bad shape
//! (V6), TensorFlow's average norm (A1), and two options at once in Keras, which
//! [`candle_grad_clip::Clip`] can't express. Of candle there are its tests of optimizers: it has
//! none of clipping.

#![allow(clippy::unwrap_used)]

mod agc_cases;
mod burn;
mod candle;
mod function_cases;
mod keras;
mod mlx;
mod optax;
mod optimizer_cases;
mod ours;
mod public_reports;
mod pytorch;
mod tensorflow;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::{ClipGradNorm, NonFinite, NormType};
use support::device::on_every_backend;
use support::gradients::{all_values, gradients_of, tensor};

/// The relative tolerance in f64.
const EXACT: f64 = 1e-12;
/// The dtype of the other frameworks' tests, and f64, in which the equations hold to the last
/// digits, each with its relative tolerance.
const WIDE: [(DType, f64); 2] = [(DType::F32, 1e-6), (DType::F64, EXACT)];

/// Runs `body` in f32 and in f64, on every backend.
fn in_wide_dtypes(body: impl Fn(DType, f64) -> Result<()>) -> Result<()> {
    on_every_backend(|| {
        WIDE.iter().try_for_each(|(dtype, tolerance)| {
            body(*dtype, *tolerance).map_err(|e| e.context(format!("{dtype:?}")))
        })
    })
}

/// An f64 gradient of one dimension.
fn vector(values: &[f64]) -> candle_core::Result<Tensor> {
    tensor(values, values.len(), DType::F64)
}

/// The elements of all gradients, concatenated.
fn elements(grads: &GradStore, vars: &[Var]) -> candle_core::Result<Vec<f64>> {
    all_values(&gradients_of(grads, vars)?)
}

/// Options with the default `eps`.
fn options(max_norm: f64, norm_type: impl Into<NormType>, non_finite: NonFinite) -> ClipGradNorm {
    ClipGradNorm {
        max_norm,
        norm_type: norm_type.into(),
        non_finite,
        ..ClipGradNorm::default()
    }
}
