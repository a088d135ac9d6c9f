//! Adaptive methods compared with an independent implementation of their equations, over random
//! histories.
#![allow(clippy::unwrap_used)]

mod agc;
mod agc_steps;
mod chain;
mod conformance;
mod formulas;
mod frozen;
mod history;
mod loss;
mod own;
mod resume;
mod schedule;
mod text;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend::{self, Backend};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{Clip, ClippedOptimizer, StepReport};
use candle_nn::{Optimizer, SGD};
use support::device::device;
use support::gradients::{empty_store, tensor, values, without_names};

/// The gradients of a step: `None` for a Var without one.
pub(crate) type Gradients = Vec<Option<Vec<f64>>>;

/// Vars with their names.
pub(crate) type Named = Vec<(String, Var)>;

pub(crate) const SIZES: [usize; 3] = [3, 1, 4];

/// Vars at zero: after a step with learning rate 1 they hold the negated gradient that the
/// optimizer got, without rounding.
pub(crate) fn zeros() -> Result<Named> {
    let var = |(i, n): (usize, &usize)| -> Result<_> {
        Ok((format!("layer{i}"), Var::zeros(*n, DType::F64, device())?))
    };
    SIZES.iter().enumerate().map(var).collect()
}

pub(crate) fn store(named: &[(String, Var)], gradients: &[Option<Vec<f64>>]) -> Result<GradStore> {
    let mut store = empty_store()?;
    for ((_, var), gradient) in named.iter().zip(gradients) {
        if let Some(gradient) = gradient {
            store.insert(var, tensor(gradient, gradient.len(), DType::F64)?);
        }
    }
    Ok(store)
}

/// Takes a step. Returns the gradients that the inner optimizer got, and the report.
pub(crate) fn step<O: Optimizer + 'static>(
    opt: &mut ClippedOptimizer<O>,
    named: &[(String, Var)],
    gradients: &[Option<Vec<f64>>],
    backend: Backend,
) -> Result<(Vec<Vec<f64>>, StepReport)> {
    for (_, var) in named {
        var.set(&var.zeros_like()?)?;
    }
    let store = store(named, gradients)?;
    let report = backend::with_backend(backend, || opt.step_report(&store))?;
    let got = |(_, var): &(String, Var)| -> Result<Vec<f64>> { Ok(values(&Tensor::neg(var)?)?) };
    Ok((named.iter().map(got).collect::<Result<_>>()?, report))
}

/// candle's SGD in the wrapper, with learning rate 1.
pub(crate) fn plain(clip: Clip) -> Result<(Named, ClippedOptimizer<SGD>)> {
    let named = zeros()?;
    let sgd = SGD::new(without_names(&named), 1.0)?;
    Ok((named.clone(), ClippedOptimizer::wrap(sgd, named, clip)?))
}

/// The fused SGD in the wrapper, with learning rate 1.
pub(crate) fn fused(clip: Clip) -> Result<(Named, ClippedOptimizer<Sgd>)> {
    let named = zeros()?;
    let sgd = Sgd::from_named_vars(named.clone(), 1.0)?;
    Ok((named.clone(), ClippedOptimizer::wrap(sgd, named, clip)?))
}

/// Random gradients whose size drifts and jumps. Sometimes a Var has none, or zeros.
pub(crate) fn random_history(seed: u64, steps: usize) -> Vec<Gradients> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut level = 10f64.powf(4.0 * rng.f64() - 2.0);
    let mut one = |_| {
        level *= (0.2 * (rng.f64() - 0.5)).exp();
        let spike = if rng.f64() < 0.15 {
            1.0 + 30.0 * rng.f64()
        } else {
            1.0
        };
        let mut gradient = |n: &usize| {
            let own = (2.0 * (rng.f64() - 0.5)).exp();
            let size = level * spike * own;
            match rng.usize(0..25) {
                0 => None,
                1 => Some(vec![0.0; *n]),
                _ => Some((0..*n).map(|_| size * (rng.f64() - 0.5)).collect()),
            }
        };
        SIZES.iter().map(&mut gradient).collect()
    };
    (0..steps).map(&mut one).collect()
}

/// All methods with a history, with settings that take effect within 40 steps.
pub(crate) fn with_history() -> Vec<Clip> {
    [
        "auto:40",
        "auto:75,window=7",
        "quantile:0.7,rate=0.3",
        "zclip:warmup=5,z_thresh=1.5,alpha=0.8,max_norm=inf",
        "zclip:warmup=3,z_thresh=1,mode=percentile,max_norm=2",
        "zclip:warmup=4,z_thresh=1.2,mode=mean,skip=true",
        "zclip:warmup=200",
        "adagc:warmup=6,beta=0.7",
        "skip:z=1.5,window=12,max_norm=3",
        "stabilizer",
        "stabilizer:gamma1=0.2,gamma2=0.99+norm:0.5",
        "skip:z=1.5,window=12+zclip:warmup=4,z_thresh=1,max_norm=inf+adagc:warmup=6,beta=0.7+norm:2",
    ]
    .iter()
    .map(|text| text.parse::<Clip>().unwrap().max_skips(1000))
    .collect()
}
