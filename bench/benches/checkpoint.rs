//! Saving and loading the history of a rule: 10^6 and 10^7 numbers, 8 bytes each.
#![allow(missing_docs)] // criterion's macros make public items without any.

use candle_core::{DType, Device, Var};
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Clip, ClipDecision, ClipRule, ClippedOptimizer, GradNorms, Result};
use candle_nn::ParamsAdamW;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Numbers of the history.
const LENS: [usize; 2] = [1_000_000, 10_000_000];

/// A rule that has only a history.
#[derive(Debug)]
struct Numbers(Vec<f64>);

impl ClipRule for Numbers {
    fn decide(&self, _: &GradNorms) -> ClipDecision {
        ClipDecision::Keep
    }

    fn save(&self) -> Vec<f64> {
        self.0.clone()
    }

    fn load(&mut self, state: &[f64]) -> std::result::Result<(), String> {
        self.0 = state.to_vec();
        Ok(())
    }
}

fn history(c: &mut Criterion) {
    try_history(c).expect("the folder for temporary files can be written");
}

fn try_history(c: &mut Criterion) -> Result<()> {
    let name = format!("candle-grad-clip-bench-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let mut group = c.benchmark_group("history");
    group.sample_size(10);
    for len in LENS {
        let w = Var::ones(3, DType::F32, &Device::Cpu)?;
        let vars = vec![("w".to_string(), w)];
        let adamw = AdamW::from_named_vars(vars.clone(), ParamsAdamW::default())?;
        let numbers = Numbers((0..len).map(|i| (i as f64).sqrt()).collect());
        let mut opt = ClippedOptimizer::wrap(adamw, vars, Clip::none())?.with_rule(numbers)?;
        group.throughput(Throughput::Bytes(8 * len as u64));
        group.bench_function(BenchmarkId::new("save", len), |b| {
            b.iter(|| opt.save(&path).expect("the file can be written"));
        });
        group.bench_function(BenchmarkId::new("load", len), |b| {
            b.iter(|| opt.load(&path).expect("the file was just saved"));
        });
    }
    group.finish();
    std::fs::remove_file(&path).ok();
    Ok(())
}

criterion_group!(benches, history);
criterion_main!(benches);
