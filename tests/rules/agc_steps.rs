//! Clipping by units within a step: fused and wrapped, in groups, of non-finite elements, on any
//! number of threads.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{
    AgcUnits, Clip, ClippedOptimizer, GroupRecord, LossScaler, NonFinite, SkipReason, StepPath,
};
use candle_nn::{Optimizer, ParamsAdamW};
use support::device::{backends, device, pool};
use support::gradients::{bits_of_vars, empty_store, tensor, values};
use support::oracle::{assert_all_close, assert_close, floor};

use super::agc::{Pair, UNITS, clipped, named, random, random_pairs, rule, store};

fn weights(pairs: &[Pair]) -> Result<Vec<f64>> {
    let vars = pairs.iter().map(|(var, _)| values(var));
    Ok(vars.collect::<candle_core::Result<Vec<_>>>()?.concat())
}

/// A fused step is that of the same optimizer alone on the clipped gradients; `backward_step`,
/// a wrapped one and a loss scale agree.
#[test]
fn fused_and_wrapped_steps_agree() -> Result<()> {
    for (dtype, tolerance) in [
        (DType::F64, 1e-12),
        (DType::F32, 1e-6),
        (DType::BF16, 0.02),
        (DType::F16, 3e-3),
    ] {
        for seed in 0..12 {
            for units in UNITS {
                for backend in backends() {
                    let what = format!("{dtype:?} {seed} {units:?} {backend:?}");
                    let after = |in_wrapper: bool, scale: f64| -> Result<Vec<f64>> {
                        let pairs = random_pairs(seed, dtype)?;
                        let named = named(&pairs);
                        let mut sgd = Sgd::from_named_vars(named.clone(), 1.0)?;
                        if in_wrapper {
                            let clip = Clip::from(rule(0.1, units));
                            let opt = ClippedOptimizer::wrap(sgd, named, clip)?;
                            let scaler = LossScaler::default().init_scale(scale);
                            let mut opt = opt.with_loss_scaler(scaler)?;
                            let mut store = empty_store()?;
                            for (var, grad) in &pairs {
                                store.insert(var, (grad * scale)?);
                            }
                            let report =
                                backend::with_backend(backend, || opt.step_report(&store))?;
                            assert_eq!(report.path(), StepPath::Fused);
                            assert!(report.was_clipped()?, "{what}");
                        } else {
                            let (clipped, _) = clipped(rule(0.1, units), &pairs)?;
                            let mut store = empty_store()?;
                            for ((var, _), clipped) in pairs.iter().zip(&clipped) {
                                store.insert(var, tensor(clipped, var.dims(), dtype)?);
                            }
                            backend::with_backend(backend, || sgd.step(&store))?;
                        }
                        weights(&pairs)
                    };
                    let right = after(false, 1.0)?;
                    // Relative to what the step subtracts from: `w - g` near 0 keeps the roundings
                    // of `w` and `g`.
                    let before = weights(&random_pairs(seed, dtype)?)?;
                    let agree = |got: Vec<f64>| {
                        assert_eq!(got.len(), right.len(), "{what}");
                        for ((x, y), w) in got.into_iter().zip(&right).zip(&before) {
                            let allowed = tolerance * w.abs().max(y.abs()) + floor(dtype);
                            assert!((x - y).abs() <= allowed, "{what}: {x:e}, expected {y:e}");
                        }
                    };
                    agree(after(true, 1.0)?);
                    if dtype != DType::F16 {
                        agree(after(true, 2.0)?);
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_is_not_finite() -> Result<()> {
    for backend in backends() {
        let weights = Tensor::new(&[[3f32, 4.0], [3.0, 4.0], [3.0, 4.0]], device())?;
        let grads = Tensor::new(
            &[[f32::NAN, 6.0], [f32::INFINITY, 8.0], [6.0, 8.0]],
            device(),
        )?;
        let pairs = vec![(Var::from_tensor(&weights)?, grads)];
        let run = |policy| {
            let clip = Clip::from(rule(1.0, AgcUnits::Rows)).non_finite(policy);
            backend::with_backend(backend, || clipped(clip, &pairs))
        };
        let error = run(NonFinite::Error).unwrap_err().to_string();
        assert!(
            error.contains("v0 with 1 NaN and 1 infinite of 6"),
            "{error}"
        );
        let (got, report) = run(NonFinite::Zero)?;
        assert_all_close(&got[0], &[0.0, 5.0, 0.0, 5.0, 3.0, 4.0], 1e-6, "zero");
        assert_close(report.total_norm()?, 200f64.sqrt(), 1e-6, "total");
        assert_close(report.record()?.clipped_norm, 75f64.sqrt(), 1e-6, "clipped");
        // As timm: the unit with a NaN becomes NaN, that with an infinity 0 and NaN, others are
        // clipped.
        let (got, report) = run(NonFinite::Propagate)?;
        assert!(got[0][..3].iter().all(|x| x.is_nan()), "{got:?}");
        assert_all_close(&got[0][3..], &[0.0, 3.0, 4.0], 1e-6, "propagate");
        assert!(report.record()?.clipped_norm.is_nan() && report.clip_coef()?.is_nan());
        let named = named(&pairs);
        let sgd = Sgd::from_named_vars(named.clone(), 1.0)?;
        let mut opt = ClippedOptimizer::wrap(sgd, named, Clip::agc())?;
        let report = opt.step_report(&store(&pairs))?;
        assert_eq!(report.record()?.skip_reason, Some(SkipReason::NonFinite));
        assert_eq!(values(&pairs[0].0)?, values(&weights)?);
    }
    Ok(())
}

#[test]
fn groups_see_their_own_smallest() -> Result<()> {
    use candle_grad_clip::optim::{ParamGroup, ParamGroups};
    let ones = Tensor::ones((2, 2), DType::F64, device())?;
    let pairs = vec![
        (Var::from_tensor(&ones)?, (&ones * 2.0)?),
        (Var::from_tensor(&ones)?, (&ones * 4.0)?),
    ];
    let groups = |limit: Option<f64>| {
        let group = |name: &str| {
            let group = ParamGroup::new(name, &[name]).lr_scale(1.0);
            limit.into_iter().fold(group, ParamGroup::max_norm)
        };
        ParamGroups::new(vec![group("v0"), group("v1")])
    };
    let named = named(&pairs);
    let make = || Sgd::from_named_vars(named.clone(), 1.0);
    let opt = ClippedOptimizer::wrap(make()?, named.clone(), rule(1.0, AgcUnits::Rows).into())?;
    let mut opt = opt.with_param_groups(groups(None)?)?;
    let report = opt.step_report(&store(&pairs))?;
    let coefs: Vec<f64> = report
        .record()?
        .groups
        .iter()
        .map(|group: &GroupRecord| group.clip_coef)
        .collect();
    assert_all_close(&coefs, &[0.5, 0.25], 1e-12, "groups");
    let opt = ClippedOptimizer::wrap(make()?, named.clone(), Clip::agc())?;
    let error = opt
        .with_param_groups(groups(Some(1.0))?)
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("clipping is 0.01"), "{error}");
    Ok(())
}

#[test]
fn the_bits_do_not_depend_on_threads() -> Result<()> {
    for units in [AgcUnits::Rows, AgcUnits::Columns] {
        let run = || -> Result<_> {
            let mut rng = fastrand::Rng::with_seed(1);
            let mut pairs = Vec::new();
            for shape in [(400, 700), (3, 70_000), (90_000, 2), (31, 17)] {
                let n = shape.0 * shape.1;
                let weights = tensor(&random(&mut rng, n), shape, DType::F32)?;
                let grads = tensor(&random(&mut rng, n), shape, DType::F32)?;
                pairs.push((Var::from_tensor(&weights)?, grads));
            }
            let named = named(&pairs);
            let adamw = AdamW::from_named_vars(named.clone(), ParamsAdamW::default())?;
            let mut opt = ClippedOptimizer::wrap(adamw, named, rule(0.5, units).into())?;
            let report = opt.step_report(&store(&pairs))?;
            let vars: Vec<Var> = pairs.iter().map(|(var, _)| var.clone()).collect();
            Ok((
                report.record()?.clipped_norm.to_bits(),
                bits_of_vars(&vars)?,
            ))
        };
        let right = run()?;
        for threads in [1, 2, 3, 8] {
            let pool = pool(threads)?;
            assert!(pool.install(run)? == right, "{units:?}, {threads} threads");
        }
    }
    Ok(())
}
