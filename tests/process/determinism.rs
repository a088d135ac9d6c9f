//! The same bits for any number of threads, from run to run, and for any order of the store.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend::{self, Backend};
use candle_grad_clip::optim::{self, ParamsSgd};
use candle_grad_clip::{
    Clip, ClippedOptimizer, NormType, clip_by_global_norm, clip_grad_norm, clip_grad_value,
    total_norm,
};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use support::device::pool;
use support::gradients::{
    FLOATS, bits, bits_of_gradients, bits_of_vars, copies, empty_store, loss_with_gradients,
    store_for, store_of, tensor, var_for, wide_values,
};

const THREADS: [usize; 4] = [1, 2, 3, 8];

/// A few small tensors, tensors around and above a block (64 Ki elements), and many tensors.
fn every_set() -> Result<Vec<(&'static str, Vec<Tensor>)>> {
    let small = vec![3, 17, 1, 1000];
    let large = vec![200_003, 5, 65_536, 65_537, 130_000, 40_000];
    let many: Vec<usize> = (0..1500).map(|i| 1 + i * 7 % 97).collect();
    let mut sets = Vec::new();
    for (name, lengths) in [("small", small), ("large", large), ("many", many)] {
        let gradient = |(i, n): (usize, &usize)| {
            let dtype = FLOATS[i % FLOATS.len()];
            let mut values = wide_values(*n, i as u64);
            if dtype == DType::F16 {
                for x in &mut values {
                    *x %= 1e4;
                }
            }
            tensor(&values, *n, dtype)
        };
        let gradients: candle_core::Result<_> = lengths.iter().enumerate().map(gradient).collect();
        sets.push((name, gradients?));
    }
    Ok(sets)
}

/// Asserts that `f` gives the same on 1, 2, 3, 8 threads, and twice on this one.
fn assert_same<R: Send + PartialEq>(what: &str, f: impl Fn() -> Result<R> + Sync) -> Result<()> {
    let first = f()?;
    assert!(f()? == first, "{what}: a second run differs");
    for threads in THREADS {
        let again = pool(threads)?.install(&f)?;
        assert!(again == first, "{what}: {threads} threads differ");
    }
    Ok(())
}

#[test]
fn total_norm_has_the_same_bits() -> Result<()> {
    for (set, gradients) in every_set()? {
        for p in [1.0, 2.0, f64::INFINITY, 0.5, 3.0] {
            assert_same(&format!("{set}, {p}-norm"), || {
                // A new store each time: its hashes, and so its order, are others.
                let (vars, store) = store_of(&gradients)?;
                Ok(total_norm(&store, &vars, NormType::from(p))?.to_bits())
            })?;
        }
    }
    Ok(())
}

#[test]
fn clipped_gradients_have_the_same_bits() -> Result<()> {
    for (set, gradients) in every_set()? {
        assert_same(&format!("{set}, norm"), || {
            let (vars, mut store) = store_of(&copies(&gradients)?)?;
            let norm = clip_grad_norm(&mut store, &vars, 1.0)?;
            Ok((norm.to_bits(), bits_of_gradients(&store, &vars)?))
        })?;
        assert_same(&format!("{set}, value"), || {
            let (vars, mut store) = store_of(&copies(&gradients)?)?;
            clip_grad_value(&mut store, &vars, 0.01)?;
            Ok(bits_of_gradients(&store, &vars)?)
        })?;
        assert_same(&format!("{set}, global norm"), || {
            let (vars, store) = store_of(&gradients)?;
            let (store, norm) = clip_by_global_norm(&store, &vars, 1.0, None)?;
            Ok((norm.to_bits(), bits_of_gradients(&store, &vars)?))
        })?;
    }
    Ok(())
}

#[test]
fn candle_ops_have_the_same_bits() -> Result<()> {
    let (_, gradients) = every_set()?.swap_remove(0);
    for p in [1.0, 2.0, f64::INFINITY, 3.0] {
        assert_same(&format!("candle_ops, {p}-norm"), || {
            let (vars, mut store) = store_of(&gradients)?;
            backend::with_backend(Backend::CandleOps, || {
                let norm = total_norm(&store, &vars, NormType::from(p))?;
                clip_grad_norm(&mut store, &vars, 1.0)?;
                Ok((norm.to_bits(), bits_of_gradients(&store, &vars)?))
            })
        })?;
    }
    Ok(())
}

/// Weights and norms of a training run through both kinds of step.
fn train<O: Optimizer + 'static>(
    gradients: &[Tensor],
    clip: &Clip,
    config: O::Config,
) -> Result<(Vec<Vec<u64>>, Vec<u64>)> {
    let vars: Vec<Var> = gradients
        .iter()
        .map(var_for)
        .collect::<candle_core::Result<_>>()?;
    let inner = O::new(vars.clone(), config)?;
    let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip.clone())?;
    let mut norms = Vec::new();
    for gain in [1.0, 3.0, 0.1] {
        let scaled: Vec<Tensor> = gradients
            .iter()
            .map(|g| g * gain)
            .collect::<candle_core::Result<_>>()?;
        let report = opt.step_report(&store_for(&vars, &scaled))?;
        norms.extend([
            report.total_norm()?,
            report.record()?.clipped_norm,
            report.clip_coef()?,
        ]);
        let report = opt.backward_step_report(&loss_with_gradients(&vars, &scaled)?)?;
        norms.extend([
            report.total_norm()?,
            report.record()?.clipped_norm,
            report.clip_coef()?,
        ]);
    }
    let norms = norms.into_iter().map(f64::to_bits).collect();
    Ok((bits_of_vars(&vars)?, norms))
}

#[test]
fn training_runs_have_the_same_bits() -> Result<()> {
    for (set, gradients) in every_set()? {
        for clip in [Clip::norm(1.0), Clip::value(0.01)] {
            let adamw = ParamsAdamW::default;
            let sgd = ParamsSgd {
                momentum: 0.9,
                ..ParamsSgd::default()
            };
            assert_same(&format!("candle's AdamW, {set}, {clip}"), || {
                train::<AdamW>(&gradients, &clip, adamw())
            })?;
            assert_same(&format!("fused AdamW, {set}, {clip}"), || {
                train::<optim::AdamW>(&gradients, &clip, adamw())
            })?;
            assert_same(&format!("fused SGD, {set}, {clip}"), || {
                train::<optim::Sgd>(&gradients, &clip, sgd)
            })?;
        }
    }
    Ok(())
}

#[test]
fn the_order_of_insertion_does_not_matter() -> Result<()> {
    for (set, gradients) in every_set()? {
        let vars: Vec<Var> = gradients
            .iter()
            .map(var_for)
            .collect::<candle_core::Result<_>>()?;
        let right = total_norm(&store_for(&vars, &gradients), &vars, NormType::L2)?;
        let mut store = empty_store()?;
        for (i, (var, gradient)) in vars.iter().zip(&gradients).enumerate().rev() {
            store.insert(var, gradient.clone());
            if i % 3 == 0 {
                // A constant's gradient between them, as `backward` leaves it.
                store.insert(&gradient.zeros_like()?, gradient.clone());
            }
        }
        let ours = total_norm(&store, &vars, NormType::L2)?;
        assert_eq!(ours.to_bits(), right.to_bits(), "{set}");
    }
    Ok(())
}

#[test]
fn sums_that_depend_on_the_order_would_show() -> Result<()> {
    // The cases above can fail: added from the other end, these values have another sum.
    let values = wide_values(200_003, 0);
    let squares = |x: &f64| x * x;
    let forward: f64 = values.iter().map(squares).sum();
    let backward: f64 = values.iter().rev().map(squares).sum();
    assert_ne!(forward.to_bits(), backward.to_bits());
    let gradient = tensor(&values, values.len(), DType::F32)?;
    assert_eq!(bits(&gradient)?, bits(&gradient.copy()?)?);
    Ok(())
}
