//! Clipping allocates much less memory than the gradients take.
#![allow(clippy::unwrap_used)]

use std::alloc::System;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{
    Clip, ClippedOptimizer, GradAccumulator, NonFinite, NormType, StepPath, clip_grad_norm,
    clip_grad_value, total_norm,
};
use candle_nn::{Optimizer, ParamsAdamW};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, Stats, StatsAlloc};
use support::checkpoints::{Folder, split, with_header};
use support::gradients::{copies, host_tensor, random_values, store_for, store_of};
use support::optimizers::Recorder;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// The counters cover the whole process, so tests run one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Allocations per call, and those of the test harness meanwhile.
const CONSTANT: usize = 128;

/// Tensors of several sizes; one is large.
fn sets() -> Result<Vec<Vec<Tensor>>> {
    let lengths: [Vec<usize>; 3] = [
        vec![50_000; 40],
        vec![300_000, 70_000, 1, 20_000],
        vec![1000; 700],
    ];
    let gradient = |n: &usize| host_tensor(&random_values(*n, *n as u64), *n, DType::F32);
    let set = |lengths: &Vec<usize>| -> Result<Vec<Tensor>> {
        Ok(lengths
            .iter()
            .map(gradient)
            .collect::<candle_core::Result<_>>()?)
    };
    lengths.iter().map(set).collect()
}

fn bytes(gradients: &[Tensor]) -> usize {
    let of = |gradient: &Tensor| gradient.elem_count() * gradient.dtype().size_in_bytes();
    gradients.iter().map(of).sum()
}

/// The allocations of `f` after a warm-up (rayon's threads, candle's caches).
fn allocated(mut f: impl FnMut() -> Result<()>) -> Result<Stats> {
    f()?;
    let region = Region::new(ALLOCATOR);
    f()?;
    Ok(region.change())
}

/// At most two small allocations per tensor, plus a constant.
fn assert_little(stats: Stats, gradients: &[Tensor], what: &str) {
    let count = stats.allocations + stats.reallocations;
    let allowed = 2 * gradients.len() + CONSTANT;
    assert!(
        count <= allowed,
        "{what}: {count} allocations, {allowed} allowed"
    );
    // The total is far below the gradients' size, so no single allocation has it.
    let (ours, theirs) = (stats.bytes_allocated, bytes(gradients));
    assert!(
        ours < theirs / 5,
        "{what}: {ours} bytes for gradients of {theirs}"
    );
}

type Edit = fn(&mut GradStore, &[Var]) -> candle_grad_clip::Result<()>;

#[test]
fn clipping_in_place_allocates_nothing_of_a_gradients_size() -> Result<()> {
    let _alone = alone();
    let edits: [(&str, Edit); 4] = [
        ("norm", |store, vars| {
            // Always below the current norm, so that every call clips.
            let norm = total_norm(store, vars, NormType::L2)?;
            clip_grad_norm(store, vars, norm / 2.0).map(drop)
        }),
        ("norm, nothing to clip", |store, vars| {
            clip_grad_norm(store, vars, 1e9).map(drop)
        }),
        ("value", |store, vars| clip_grad_value(store, vars, 0.5)),
        ("norm only", |store, vars| {
            total_norm(store, vars, NormType::L2).map(drop)
        }),
    ];
    for gradients in sets()? {
        for (name, edit) in edits {
            let (vars, mut store) = store_of(&copies(&gradients)?)?;
            let stats = allocated(|| Ok(edit(&mut store, &vars)?))?;
            let what = format!("{name}, {} tensors", gradients.len());
            assert_little(stats, &gradients, &what);
        }
    }
    Ok(())
}

/// AGC for vectors, each of which is one unit, with zero weights.
fn agc() -> Clip {
    "agc:clipping=0.1".parse().unwrap()
}

#[test]
fn a_step_keeps_one_buffer() -> Result<()> {
    let _alone = alone();
    for gradients in sets()? {
        for clip in [Clip::norm(0.5), Clip::value(0.5), Clip::none(), agc()] {
            let what = format!("{clip}, {} tensors", gradients.len());
            let (vars, _) = store_of(&gradients)?;
            let store = store_for(&vars, &gradients);
            let inner = Recorder::new(vars.clone(), false)?;
            let mut opt = ClippedOptimizer::wrap(inner, vars, clip.clone())?;

            let region = Region::new(ALLOCATOR);
            opt.step(&store)?;
            let (first, size) = (region.change().bytes_allocated, bytes(&gradients));
            if clip == Clip::none() {
                assert!(first < size / 5, "{what}: {first} bytes, nothing is copied");
            } else {
                assert!(first >= size, "{what}: {first} bytes, the buffer is {size}");
                assert!(
                    first < size + size / 5,
                    "{what}: {first} bytes, the buffer is {size}"
                );
            }

            let stats = allocated(|| Ok(opt.step(&store)?))?;
            let (ours, count) = (stats.bytes_allocated, stats.allocations);
            assert!(ours < size / 5, "{what}: {ours} bytes in a later step");
            let allowed = 3 * gradients.len() + CONSTANT;
            assert!(
                count <= allowed,
                "{what}: {count} allocations, {allowed} allowed"
            );
        }
    }
    Ok(())
}

/// Clip and step. The total allocated by a step is an upper bound of its peak.
#[test]
fn a_fused_step_stays_below_its_memory() -> Result<()> {
    const MIB: usize = 1 << 20;
    let _alone = alone();
    let one_mib = sets()?.into_iter().map(|set| (set, MIB));
    for (gradients, limit) in one_mib.chain([(many_small()?, 2 * MIB)]) {
        fused::<AdamW>(&gradients, ParamsAdamW::default(), limit)?;
        let params = ParamsSgd {
            momentum: 0.5,
            ..ParamsSgd::default()
        };
        fused::<Sgd>(&gradients, params, limit)?;
    }
    Ok(())
}

/// 10,000 tensors of 64 to 4096 elements, like set C of the benchmark.
fn many_small() -> Result<Vec<Tensor>> {
    let lengths = (0..10_000).map(|i| 64 + (i * 7919) % 4033);
    let gradient = |n: usize| host_tensor(&vec![0.5; n], n, DType::F32);
    Ok(lengths.map(gradient).collect::<candle_core::Result<_>>()?)
}

fn fused<O: Optimizer<Config: Clone> + 'static>(
    gradients: &[Tensor],
    config: O::Config,
    limit: usize,
) -> Result<()> {
    for clip in [Clip::norm(0.5), Clip::value(0.25), Clip::none(), agc()] {
        let name = std::any::type_name::<O>();
        let what = format!("{name} {clip}, {} tensors", gradients.len());
        let (vars, _) = store_of(gradients)?;
        let store = store_for(&vars, gradients);
        let inner = O::new(vars.clone(), config.clone())?;
        let mut opt = ClippedOptimizer::wrap(inner, vars, clip)?;
        let stats = allocated(|| Ok(opt.step(&store)?))?;
        assert_eq!(opt.last_report().unwrap().path(), StepPath::Fused);
        assert_little(stats, gradients, &what);
        let bytes = stats.bytes_allocated;
        // Units also need the stats of each unit's gradient and weights.
        let limit = if what.contains("agc") {
            2 * limit
        } else {
            limit
        };
        assert!(bytes < limit, "{what}: {bytes} bytes, {limit} allowed");
    }
    Ok(())
}

/// The units of matrices need some numbers each, far less than the matrix.
#[test]
fn units_of_matrices_allocate_little() -> Result<()> {
    let _alone = alone();
    let gradients = [(600, 500), (64, 4096)].map(|(rows, columns)| {
        host_tensor(&vec![0.5; rows * columns], (rows, columns), DType::F32)
    });
    let gradients: Vec<Tensor> = gradients.into_iter().collect::<candle_core::Result<_>>()?;
    for units in ["rows", "columns"] {
        for is_fused in [true, false] {
            let (vars, _) = store_of(&gradients)?;
            for (i, var) in vars.iter().enumerate() {
                // Different weights give different coefficients.
                let ramp = Tensor::arange(0f32, var.elem_count() as f32, &Device::Cpu)?;
                var.set(&(ramp.reshape(var.shape())? * f64::from(i as u32 + 1))?)?;
            }
            let store = store_for(&vars, &gradients);
            let clip: Clip = format!("agc:clipping=1e-9,units={units}").parse()?;
            let stats = if is_fused {
                let inner = AdamW::new(vars.clone(), ParamsAdamW::default())?;
                let mut opt = ClippedOptimizer::wrap(inner, vars, clip)?;
                let stats = allocated(|| Ok(opt.step(&store)?))?;
                assert!(opt.last_report().unwrap().record()?.num_clipped > 100);
                stats
            } else {
                let inner = Recorder::new(vars.clone(), false)?;
                let mut opt = ClippedOptimizer::wrap(inner, vars, clip)?;
                allocated(|| Ok(opt.step(&store)?))?
            };
            let what = format!("{units}, fused {is_fused}");
            let (ours, theirs) = (stats.bytes_allocated, bytes(&gradients));
            // Each task of columns gathers in a buffer of 4 KiB.
            assert!(
                ours < theirs / 2,
                "{what}: {ours} bytes for gradients of {theirs}"
            );
        }
    }
    Ok(())
}

/// From the second micro-batch on, also in the next round.
#[test]
fn accumulating_keeps_its_buffers() -> Result<()> {
    let _alone = alone();
    for gradients in sets()? {
        for dtype in [DType::F32, DType::BF16] {
            for policy in [NonFinite::Propagate, NonFinite::SkipStep] {
                let gradients = gradients.iter().map(|gradient| gradient.to_dtype(dtype));
                let gradients: Vec<Tensor> = gradients.collect::<candle_core::Result<_>>()?;
                let (vars, store) = store_of(&gradients)?;
                let mut accumulator = GradAccumulator::mean(vars).non_finite(policy);
                accumulator.add(&store)?;
                let what = format!("{dtype:?} {policy:?}, {} tensors", gradients.len());
                let region = Region::new(ALLOCATOR);
                accumulator.add(&store)?;
                assert_little(region.change(), &gradients, &format!("{what}: second"));
                let region = Region::new(ALLOCATOR);
                accumulator.take_grads()?.unwrap();
                assert_little(region.change(), &gradients, &format!("{what}: finish"));
                let region = Region::new(ALLOCATOR);
                accumulator.add(&store)?;
                assert_little(region.change(), &gradients, &format!("{what}: next round"));
            }
        }
    }
    Ok(())
}

#[test]
fn the_counter_counts() -> Result<()> {
    let _alone = alone();
    let gradients = sets()?.swap_remove(0);
    let stats = allocated(|| Ok(copies(&gradients).map(drop)?))?;
    assert!(stats.bytes_allocated >= bytes(&gradients));
    Ok(())
}

/// Saving allocates a buffer, and loading a buffer and the state, whatever the file claims.
#[test]
fn checkpoints_are_not_held_in_memory() -> Result<()> {
    const BUFFER: usize = (1 << 20) + (64 << 10);
    let _alone = alone();
    let folder = Folder::in_memory()?;
    let path = folder.join("o");
    let w = Var::ones(300_000, DType::F32, &Device::Cpu)?;
    let params = candle_nn::ParamsAdamW {
        lr: 0.1,
        ..Default::default()
    };
    let make = || AdamW::from_named_vars(vec![("w".to_string(), w.clone())], params.clone());
    let mut opt = make()?;
    opt.backward_step(&w.sqr()?.sum_all()?)?;
    let stats = allocated(|| Ok(opt.save(&path)?))?;
    assert!(stats.bytes_allocated < BUFFER, "{stats:?}");
    let stats = allocated(|| Ok(opt.load(&path)?))?;
    assert!(
        stats.bytes_allocated < BUFFER + 2 * 300_000 * 4,
        "{stats:?}"
    );

    let bytes = fs::read(&path)?;
    let claims = |header: &str| -> Result<usize> {
        fs::write(&path, with_header(header, &[]))?;
        let mut opt = make()?;
        let stats = allocated(|| {
            assert!(opt.load(&path).is_err());
            Ok(())
        })?;
        Ok(
            (stats.bytes_allocated + stats.bytes_reallocated.unsigned_abs()).saturating_sub(BUFFER)
                / header.len(),
        )
    };
    let (whole, _) = split(&bytes)?;
    assert_eq!(claims(whole)?, 0); // the header claims 2.4 MB that the file does not have
    let many = "0,".repeat(100_000) + "0";
    for header in [
        format!("{{\"a\":{{\"dtype\":\"F32\",\"shape\":[{many}],\"data_offsets\":[0,0]}}}}"),
        format!("{{\"__metadata__\":{{\"note\":[{many}]}}}}"),
        whole.replace("[300000]", &format!("[{many}]")),
        format!(
            "{{{}",
            "\"\":{\"dtype\":\"\",\"shape\":[],\"data_offsets\":[0,0]},".repeat(10_000)
        ),
    ] {
        let times = claims(&header)?;
        assert!(times < 32, "{times} times the file's size");
    }
    Ok(())
}
