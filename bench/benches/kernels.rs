//! The kernels on slices: bytes a second for every dtype, from the first cache to main memory.
#![allow(missing_docs)] // criterion's macros make public items without any.

use candle_grad_clip_kernels::{
    AdamW, Edit, Element, NormType, Stats, UnitEdit, Units, Update, Wide, edit, measure,
    measure_units, update,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use std::hint::black_box;

/// 1 k, 64 k and 4 M elements.
const LENS: [usize; 3] = [1 << 10, 1 << 16, 1 << 22];

/// Elements of a row, where units are measured and edited.
const ROW: usize = 1 << 10;

/// Turns signs at every call: values stay in range however often it runs.
const SCALE: Edit = Edit::Scale {
    clip_coef: -1.0,
    zero_non_finite: false,
};
const CLAMP: Edit = Edit::Clamp {
    clip_value: 0.5,
    clip_coef: 1.0,
    zero_non_finite: false,
};

const ADAMW: AdamW = AdamW {
    lr: 1e-9,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.0,
    step: 100_000,
};

fn dtype<E: Element>(c: &mut Criterion, name: &str, from_f32: impl Fn(f32) -> E) {
    let mut group = c.benchmark_group(name);
    for len in LENS {
        let mut rng = fastrand::Rng::with_seed(len as u64);
        let mut values: Vec<E> = (0..len).map(|_| from_f32(rng.f32() - 0.5)).collect();
        group.throughput(Throughput::Bytes(size_of_val(values.as_slice()) as u64));
        group.bench_function(BenchmarkId::new("measure", len), |b| {
            b.iter(|| measure(black_box(&values), NormType::L2));
        });
        group.bench_function(BenchmarkId::new("scale", len), |b| {
            b.iter(|| edit(black_box(&mut values), SCALE));
        });
        group.bench_function(BenchmarkId::new("clamp", len), |b| {
            b.iter(|| edit(black_box(&mut values), CLAMP));
        });
        for (name, units) in [("rows", Units::Rows(ROW)), ("columns", Units::Columns(ROW))] {
            let mut stats = vec![Stats::ZERO; units.count(len)];
            group.bench_function(BenchmarkId::new(format!("measure {name}"), len), |b| {
                b.iter(|| measure_units(black_box(&values), units, NormType::L2, &mut stats));
            });
            let turn = UnitEdit {
                units,
                coefs: &vec![-1.0; units.count(len)],
                zero_non_finite: false,
            };
            group.bench_function(BenchmarkId::new(format!("scale {name}"), len), |b| {
                b.iter(|| edit(black_box(&mut values), turn));
            });
        }
        let (mut params, zero) = (values.clone(), E::Wide::from_f64(0.0));
        let mut moments = [vec![zero; len], vec![zero; len]];
        let mut master = vec![zero; len];
        let is_half = size_of::<E>() == 2;
        for (name, with_master) in [("adamw", false), ("adamw with master", true)] {
            if with_master && !is_half {
                continue;
            }
            group.bench_function(BenchmarkId::new(name, len), |b| {
                b.iter(|| {
                    let [first, second] = &mut moments;
                    let whole = Update {
                        params: &mut params,
                        grads: black_box(&values),
                        moments: [first, second, &mut []],
                        master: if with_master { &mut master } else { &mut [] },
                    };
                    update(whole, SCALE, &ADAMW);
                });
            });
        }
    }
    group.finish();
}

fn kernels(c: &mut Criterion) {
    dtype(c, "f32", |x| x);
    dtype(c, "f64", f64::from);
    dtype(c, "f16", f16::from_f32);
    dtype(c, "bf16", bf16::from_f32);
}

criterion_group!(benches, kernels);
criterion_main!(benches);
