//! What `ClippedOptimizer::step` adds to candle's SGD: nothing to clip, and every step clipped.
#![allow(missing_docs)] // criterion's macros make public items without any.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::{Optimizer, SGD};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

/// Tensors and elements of each: a small model, many small tensors, a few large ones.
const MODELS: [(usize, usize); 3] = [(30, 1 << 10), (1000, 1 << 10), (4, 1 << 22)];

fn model(tensors: usize, elements: usize) -> Result<(Vec<Var>, GradStore)> {
    let mut grads = GradStore::default();
    let mut vars = Vec::with_capacity(tensors);
    for _ in 0..tensors {
        let var = Var::zeros(elements, DType::F32, &Device::Cpu)?;
        grads.insert(&var, Tensor::randn(0f32, 1.0, elements, &Device::Cpu)?);
        vars.push(var);
    }
    Ok((vars, grads))
}

fn step(c: &mut Criterion) {
    try_step(c).expect("candle can make tensors and take steps");
}

fn try_step(c: &mut Criterion) -> Result<()> {
    for (tensors, elements) in MODELS {
        let size = format!("{tensors} x {elements}");
        let mut group = c.benchmark_group("sgd");
        let (vars, grads) = model(tensors, elements)?;
        let sgd = || SGD::new(vars.clone(), 1e-9);
        let mut plain = sgd()?;
        group.bench_function(BenchmarkId::new("plain", &size), |b| {
            b.iter(|| plain.step(&grads).expect("SGD takes the step"));
        });
        // `step` leaves the gradients alone, so each call clips the same ones.
        for (name, max_norm) in [("nothing to clip", 1e9), ("clipped", 1.0)] {
            let mut clipped = ClippedOptimizer::wrap(sgd()?, vars.clone(), Clip::norm(max_norm))?;
            clipped.step_report(&grads)?;
            group.bench_function(BenchmarkId::new(name, &size), |b| {
                b.iter(|| {
                    clipped
                        .step(&grads)
                        .expect("clipping works, SGD takes the step");
                });
            });
        }
        group.finish();
    }
    Ok(())
}

criterion_group!(benches, step);
criterion_main!(benches);
