//! What the other frameworks' own tests expect of norms and values, by hand, on every backend.
//!
//! A file for each framework; a test starts with its case: in PyTorch's `t1`..., in TensorFlow's
//! `v` (values), `n` (norm), `g` (global norm). Not here, since we have nothing of the kind: bounds
//! that differ by sign or element (V2, V3) and so bounds of a bad shape (V6), TensorFlow's average
//! norm (A1), and two options at once in Keras, which [`candle_grad_clip::Clip`] cannot say.

#[path = "conformance/burn.rs"]
mod burn;
#[path = "conformance/keras.rs"]
mod keras;
#[path = "conformance/mlx.rs"]
mod mlx;
#[path = "conformance/optax.rs"]
mod optax;
#[path = "conformance/ours.rs"]
mod ours;
#[path = "public_reports.rs"]
mod public_reports;
#[path = "conformance/pytorch.rs"]
mod pytorch;
#[path = "conformance/tensorflow.rs"]
mod tensorflow;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::{ClipGradNorm, NonFinite, NormType, backend};
use support::device::backends;
use support::gradients::{all_values, gradients_of, tensor};

/// Relative, in f64.
const EXACT: f64 = 1e-12;
const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];
/// The dtype that the other frameworks' tests run in, and the one in which the equations hold to the
/// last digits, each with its relative tolerance.
const WIDE: [(DType, f64); 2] = [(DType::F32, 1e-6), (DType::F64, EXACT)];

/// Runs a body on every backend.
fn on_every_backend(body: impl Fn() -> Result<()>) -> Result<()> {
    backends().into_iter().try_for_each(|backend| {
        backend::with_backend(backend, &body).map_err(|e| e.context(format!("{backend:?}")))
    })
}

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
