//! What the other frameworks' own tests expect of norms and values, by hand, and what they return,
//! as data.
//!
//! A file for each framework; a test starts with its case: in PyTorch's `t1`..., in TensorFlow's
//! `v` (values), `n` (norm), `g` (global norm). Not here, since we have nothing of the kind: bounds
//! that differ by sign or element (V2, V3) and so bounds of a bad shape (V6), TensorFlow's average
//! norm (A1), and two options at once in Keras, which [`candle_grad_clip::Clip`] cannot say.

#![allow(clippy::unwrap_used)]

mod agc_cases;
mod burn;
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

/// Relative, in f64.
const EXACT: f64 = 1e-12;
/// The dtype that the other frameworks' tests run in, and the one in which the equations hold to
/// the last digits, each with its relative tolerance.
const WIDE: [(DType, f64); 2] = [(DType::F32, 1e-6), (DType::F64, EXACT)];

/// Runs a body in f32 and in f64, on every backend.
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

/// The elements of all gradients, one after the other.
fn elements(grads: &GradStore, vars: &[Var]) -> candle_core::Result<Vec<f64>> {
    all_values(&gradients_of(grads, vars)?)
}

/// The default `eps`.
fn options(max_norm: f64, norm_type: impl Into<NormType>, non_finite: NonFinite) -> ClipGradNorm {
    ClipGradNorm {
        max_norm,
        norm_type: norm_type.into(),
        non_finite,
        ..ClipGradNorm::default()
    }
}
