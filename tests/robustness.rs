//! No panic, and the right answer, for anything that the types allow.
//!
//! A gradient on another device than its Var needs a second device: it can't be tested on CPU.
#![allow(clippy::unwrap_used)]

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::{
    Clip, ClipGradNorm, ClippedOptimizer, Error, NonFinite, NormType, Summary, clip_by_global_norm,
    clip_grad_norm, clip_grad_norm_with, clip_grad_value, clip_grads_with_norm, total_norm,
};
use candle_nn::{Optimizer, SGD};
use std::time::Duration;
use support::device::{backends, device};
use support::gradients::{
    all_values, bits, bits_of_gradients, bits_of_vars, gradients_of, store_for, store_of, tensor,
    values, var_for,
};
use support::optimizers::Recorder;
use support::oracle::assert_close;
use support::watchdog::Watchdog;

const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// Every free function and a step of a wrapped optimizer, on copies of the same gradients. Returns
/// the norm that all agree on.
fn everything(gradients: &[Tensor]) -> Result<f64> {
    let mut norms = Vec::new();
    for backend in backends() {
        backend::with_backend(backend, || -> Result<()> {
            let fresh = || -> Result<(Vec<Var>, GradStore)> {
                let copies: candle_core::Result<Vec<Tensor>> =
                    gradients.iter().map(Tensor::copy).collect();
                Ok(store_of(&copies?)?)
            };
            for norm_type in [NormType::L1, NormType::Inf, NormType::P(3.0)] {
                let (vars, store) = fresh()?;
                assert!(total_norm(&store, &vars, norm_type)? >= 0.0);
            }
            let (vars, mut store) = fresh()?;
            norms.push(total_norm(&store, &vars, NormType::L2)?);
            norms.push(clip_grad_norm(&mut store, &vars, 0.5)?);
            assert!(total_norm(&store, &vars, NormType::L2)? <= 0.5 * 1.01);
            let (vars, mut store) = fresh()?;
            clip_grad_value(&mut store, &vars, 0.5)?;
            let (vars, mut store) = fresh()?;
            clip_grads_with_norm(&mut store, &vars, 0.5, 2.0)?;
            let (vars, store) = fresh()?;
            norms.push(clip_by_global_norm(&store, &vars, 0.5, None)?.1);
            for clip in [Clip::none(), Clip::norm(0.5), Clip::value(0.5)] {
                let (vars, store) = fresh()?;
                // candle's own optimizers fail on a Var without elements.
                let inner = Recorder::new(vars.clone(), true)?;
                let mut opt = ClippedOptimizer::wrap(inner, vars, clip)?.with_param_norms(true);
                norms.push(opt.step_report(&store)?.total_norm()?);
            }
            Ok(())
        })?;
    }
    for norm in &norms {
        assert_close(*norm, norms[0], 1e-6, "all functions and backends");
    }
    Ok(norms[0])
}

#[test]
fn no_vars_and_an_empty_store() -> Result<()> {
    assert_eq!(everything(&[])?, 0.0);
    let vars = [Var::ones(3, DType::F32, device())?];
    let mut empty = GradStore::default();
    assert_eq!(total_norm(&empty, &vars, NormType::L2)?, 0.0);
    assert_eq!(clip_grad_norm(&mut empty, &vars, 1.0)?, 0.0);
    assert_eq!(clip_grad_norm(&mut empty, &vars, 0.0)?, 0.0);
    clip_grad_value(&mut empty, &vars, 1.0)?;
    assert!(empty.get(&vars[0]).is_none());
    let mut opt = ClippedOptimizer::wrap(SGD::new(vec![], 0.1)?, vars.to_vec(), Clip::norm(1.0))?;
    assert_eq!(opt.step_report(&empty)?.missing(), ["var.0"]);
    Ok(())
}

#[test]
fn tensors_without_elements() -> Result<()> {
    for dtype in FLOATS {
        let shapes: [&[usize]; 5] = [&[0], &[0, 3], &[3, 0], &[2, 0, 4], &[0, 0]];
        for shape in shapes {
            let empty = tensor(&[], shape, dtype)?;
            assert_eq!(everything(std::slice::from_ref(&empty))?, 0.0, "{shape:?}");
            let full = tensor(&[3.0, -4.0], 2, dtype)?;
            assert_eq!(
                everything(&[full.clone(), empty.clone()])?,
                5.0,
                "{shape:?}"
            );
            assert_eq!(everything(&[empty, full])?, 5.0, "{shape:?}");
        }
    }
    Ok(())
}

#[test]
fn scalars_and_single_elements() -> Result<()> {
    for dtype in FLOATS {
        let shapes: [&[usize]; 4] = [&[], &[1], &[1, 1], &[1, 1, 1, 1, 1, 1]];
        for shape in shapes {
            assert_eq!(
                everything(&[tensor(&[-7.0], shape, dtype)?])?,
                7.0,
                "{shape:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_var_listed_twice_counts_and_scales_once() -> Result<()> {
    for backend in backends() {
        backend::with_backend(backend, || -> Result<()> {
            let gradient = tensor(&[3.0, 4.0], 2, DType::F64)?;
            let (vars, mut store) = store_of(&[gradient])?;
            let twice = [vars[0].clone(), vars[0].clone(), vars[0].clone()];
            assert_eq!(total_norm(&store, &twice, NormType::L2)?, 5.0);
            assert_eq!(clip_grad_norm(&mut store, &twice, 2.5)?, 5.0);
            let clipped = values(store.get(&vars[0]).unwrap())?;
            assert_close(clipped[0], 1.5, 1e-6, "scaled once");
            assert_close(clipped[1], 2.0, 1e-6, "scaled once");
            clip_grads_with_norm(&mut store, &twice, 1.0, 2.0)?;
            assert_close(
                total_norm(&store, &twice, NormType::L2)?,
                1.25,
                1e-5,
                "once",
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn tied_weights_count_once_under_their_first_name() -> Result<()> {
    let gradient = tensor(&[3.0, 4.0], 2, DType::F32)?;
    let (vars, store) = store_of(&[gradient])?;
    let tied = vec![
        ("embed".to_string(), vars[0].clone()),
        ("head".to_string(), vars[0].clone()),
    ];
    let inner = SGD::new(vars.clone(), 1.0)?;
    let mut opt = ClippedOptimizer::wrap(inner, tied, Clip::norm(2.5))?.with_param_norms(true);
    let report = opt.step_report(&store)?;
    assert_eq!(report.total_norm()?, 5.0);
    assert_eq!(report.param_norms()?, [("embed", 5.0)]);
    let weights = values(&vars[0])?;
    assert_close(weights[0], -1.5, 1e-6, "one step");
    Ok(())
}

/// A refused gradient, beside a good one, and the text of its error.
fn refused() -> Result<Vec<(Var, Tensor, &'static str)>> {
    let var = || Var::zeros((2, 3), DType::F32, device());
    let like = |dtype| Tensor::ones((2, 3), dtype, device());
    Ok(vec![
        (
            var()?,
            tensor(&[0.0; 6], (3, 2), DType::F32)?,
            "var.1 has shape [2, 3], but its gradient has shape [3, 2]",
        ),
        (
            var()?,
            tensor(&[0.0], (), DType::F32)?,
            "var.1 has shape [2, 3], but its gradient has shape []",
        ),
        (
            var()?,
            like(DType::BF16)?,
            "var.1 has dtype F32, but its gradient has dtype BF16",
        ),
        (
            var()?,
            like(DType::U8)?,
            "the gradient of var.1 is U8, expected F32, F64, F16 or BF16",
        ),
        (
            var()?,
            like(DType::I64)?,
            "the gradient of var.1 is I64, expected F32, F64, F16 or BF16",
        ),
        (
            var()?,
            like(DType::F32)?.to_dtype(DType::F8E4M3)?,
            "the gradient of var.1 is F8E4M3, expected F32, F64, F16 or BF16",
        ),
        (
            Var::zeros((2, 3), DType::U32, device())?,
            like(DType::U32)?,
            "the gradient of var.1 is U32, expected F32, F64, F16 or BF16",
        ),
    ])
}

#[test]
fn a_gradient_that_does_not_fit_is_an_error_that_changes_nothing() -> Result<()> {
    for (var, gradient, text) in refused()? {
        let good = tensor(&[30.0, 40.0], 2, DType::F32)?;
        let vars = [var_for(&good)?, var, var_for(&good)?];
        let mut store = store_for(&vars, &[good.clone(), gradient, good.copy()?]);
        let gradients = bits_of_gradients(&store, &vars)?;
        let weights = bits_of_vars(&vars)?;
        for backend in backends() {
            backend::with_backend(backend, || {
                let mut errors = vec![
                    total_norm(&store, &vars, NormType::L2).unwrap_err(),
                    clip_grad_norm(&mut store, &vars, 1.0).unwrap_err(),
                    clip_grad_norm(&mut store, &vars, f64::INFINITY).unwrap_err(),
                    clip_grad_value(&mut store, &vars, 1.0).unwrap_err(),
                    clip_grad_value(&mut store, &vars, f64::INFINITY).unwrap_err(),
                    clip_grads_with_norm(&mut store, &vars, 1.0, 50.0).unwrap_err(),
                    clip_by_global_norm(&store, &vars, 1.0, None)
                        .map(drop)
                        .unwrap_err(),
                    clip_by_global_norm(&store, &vars, 1.0, Some(50.0))
                        .map(drop)
                        .unwrap_err(),
                ];
                for non_finite in [NonFinite::Error, NonFinite::SkipStep, NonFinite::Zero] {
                    let inner = SGD::new(vars.to_vec(), 1.0)?;
                    let clip = Clip::norm(1.0).non_finite(non_finite);
                    let mut opt = ClippedOptimizer::wrap(inner, vars.to_vec(), clip)?;
                    errors.push(opt.step_report(&store).unwrap_err());
                    assert!(opt.last_report().is_none());
                }
                for error in errors {
                    assert_eq!(error.to_string(), text);
                }
                anyhow::Ok(())
            })?;
        }
        assert_eq!(bits_of_gradients(&store, &vars)?, gradients, "{text}");
        assert_eq!(bits_of_vars(&vars)?, weights, "{text}");
    }
    Ok(())
}

#[test]
fn of_several_bad_vars_the_first_is_named() -> Result<()> {
    // Enough Vars for several tasks on several threads.
    let gradients: Vec<Tensor> = (0..2000)
        .map(|_| tensor(&[1.0], 1, DType::F32))
        .collect::<candle_core::Result<_>>()?;
    let (vars, mut store) = store_of(&gradients)?;
    for index in [777, 1300, 1999] {
        store.insert(&vars[index], tensor(&[f64::NAN], 1, DType::F32)?);
    }
    for _ in 0..20 {
        let error = clip_grad_norm(&mut store, &vars, 1.0).unwrap_err();
        assert!(
            matches!(&error, Error::NonFinite { var, total: 3, .. } if var == "var.777"),
            "{error}"
        );
    }
    for index in [500, 1200] {
        store.insert(&vars[index], tensor(&[1.0, 1.0], 2, DType::F32)?);
    }
    for _ in 0..20 {
        let error = clip_grad_norm(&mut store, &vars, 1.0)
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("var.500 has shape [1]"), "{error}");
    }
    Ok(())
}

#[test]
fn options_out_of_range_are_errors_that_change_nothing() -> Result<()> {
    let (vars, mut store) = store_of(&[tensor(&[3.0, 4.0], 2, DType::F32)?])?;
    let before = bits_of_gradients(&store, &vars)?;
    let with = |options: ClipGradNorm| options;
    let default = ClipGradNorm::default();
    for limit in [f64::NAN, -1.0, -f64::INFINITY, -5e-324] {
        clip_grad_norm(&mut store, &vars, limit).unwrap_err();
        clip_grad_value(&mut store, &vars, limit).unwrap_err();
        clip_grads_with_norm(&mut store, &vars, limit, 5.0).unwrap_err();
        clip_grads_with_norm(&mut store, &vars, 1.0, limit).unwrap_err();
        clip_by_global_norm(&store, &vars, limit, None)
            .map(drop)
            .unwrap_err();
        clip_by_global_norm(&store, &vars, 1.0, Some(limit))
            .map(drop)
            .unwrap_err();
        let options = with(ClipGradNorm {
            eps: limit,
            ..default
        });
        clip_grad_norm_with(&mut store, &vars, &options).unwrap_err();
        let options = with(ClipGradNorm {
            norm_type: NormType::P(limit),
            ..default
        });
        clip_grad_norm_with(&mut store, &vars, &options).unwrap_err();
        total_norm(&store, &vars, NormType::P(limit)).unwrap_err();
        total_norm(&store, &vars, NormType::from(limit)).unwrap_err();
    }
    for norm in [f64::INFINITY, f64::NAN] {
        clip_grads_with_norm(&mut store, &vars, 1.0, norm).unwrap_err();
    }
    total_norm(&store, &vars, NormType::P(0.0)).unwrap_err();
    let options = ClipGradNorm {
        eps: f64::INFINITY,
        ..default
    };
    clip_grad_norm_with(&mut store, &vars, &options).unwrap_err();
    assert_eq!(bits_of_gradients(&store, &vars)?, before);
    Ok(())
}

#[test]
fn a_clip_out_of_range_is_refused_by_all_that_take_one() -> Result<()> {
    let vars = vec![Var::zeros(2, DType::F32, device())?];
    let mut opt = ClippedOptimizer::wrap(SGD::new(vars.clone(), 0.1)?, vars.clone(), Clip::none())?;
    let limits = [0.0, -0.0, -1.0, f64::NAN, -f64::INFINITY];
    let mut refused: Vec<Clip> = Vec::new();
    for limit in limits {
        refused.extend([Clip::norm(limit), Clip::value(limit)]);
        refused.push(Clip::none().norm_type(NormType::P(limit)));
    }
    for eps in [-1e-6, f64::NAN, f64::INFINITY] {
        refused.push(Clip::norm(1.0).eps(eps));
    }
    for clip in refused {
        let inner = SGD::new(vars.clone(), 0.1)?;
        ClippedOptimizer::wrap(inner, vars.clone(), clip.clone())
            .map(drop)
            .unwrap_err();
        opt.set_clip(clip).unwrap_err();
        assert_eq!(opt.clip(), &Clip::none());
    }
    opt.set_clip(Clip::norm(f64::INFINITY))?;
    opt.set_clip(Clip::norm(5e-324).norm_type(NormType::P(5e-324)).eps(0.0))?;
    Ok(())
}

#[test]
fn an_infinite_limit_never_writes_nan() -> Result<()> {
    for bad in [f64::NAN, f64::INFINITY] {
        for backend in backends() {
            let (vars, mut store) = store_of(&[tensor(&[bad, 2.0], 2, DType::F32)?])?;
            let before = bits_of_gradients(&store, &vars)?;
            let options = ClipGradNorm {
                max_norm: f64::INFINITY,
                non_finite: NonFinite::Propagate,
                ..ClipGradNorm::default()
            };
            backend::with_backend(backend, || -> Result<()> {
                clip_grad_norm_with(&mut store, &vars, &options)?;
                clip_grad_value(&mut store, &vars, f64::INFINITY)?;
                Ok(())
            })?;
            assert_eq!(
                bits_of_gradients(&store, &vars)?,
                before,
                "{bad} {backend:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn policies_of_the_free_function() -> Result<()> {
    for backend in backends() {
        backend::with_backend(backend, || -> Result<()> {
            let with = |non_finite| -> Result<(candle_grad_clip::Result<f64>, Vec<f64>)> {
                let gradients = [
                    tensor(&[f64::NAN, 3.0], 2, DType::F32)?,
                    tensor(&[4.0, f64::INFINITY], 2, DType::F32)?,
                ];
                let (vars, mut store) = store_of(&gradients)?;
                let options = ClipGradNorm {
                    non_finite,
                    ..ClipGradNorm::default()
                };
                let norm = clip_grad_norm_with(&mut store, &vars, &options);
                Ok((norm, all_values(&gradients_of(&store, &vars)?)?))
            };
            let (norm, left) = with(NonFinite::SkipStep)?;
            assert!(norm?.is_nan() && left[1..3] == [3.0, 4.0], "left alone");
            let (norm, left) = with(NonFinite::Error)?;
            assert!(norm.is_err() && left[1..3] == [3.0, 4.0], "left alone");
            let (norm, cleaned) = with(NonFinite::Zero)?;
            assert_eq!((norm?, cleaned[0], cleaned[3]), (5.0, 0.0, 0.0));
            assert_close(cleaned[1], 0.6, 1e-6, "of the finite elements");
            let (norm, all_nan) = with(NonFinite::Propagate)?;
            assert!(
                norm?.is_nan() && all_nan.iter().all(|x| x.is_nan()),
                "as PyTorch does"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn gradients_that_carry_the_graph_are_taken() -> Result<()> {
    let x = Var::new(&[[1f32, 2.0], [3.0, 4.0]], device())?;
    let var = Var::zeros((2, 2), DType::F32, device())?;
    let tracked = (x.as_tensor() * 10.0)?;
    assert!(tracked.track_op());
    let mut store = GradStore::default();
    store.insert(&var, tracked);
    let weights = bits(&x)?;
    for backend in backends() {
        let vars = std::slice::from_ref(&var);
        backend::with_backend(backend, || clip_grad_norm(&mut store, vars, 1.0))?;
        let norm = total_norm(&store, vars, NormType::L2)?;
        assert_close(norm, 1.0, 1e-5, "clipped");
    }
    assert_eq!(bits(&x)?, weights);
    Ok(())
}

#[test]
fn a_failing_inner_optimizer_leaves_the_gradients_and_no_report() -> Result<()> {
    struct Failing;
    impl Optimizer for Failing {
        type Config = ();
        fn new(_: Vec<Var>, (): ()) -> candle_core::Result<Self> {
            Ok(Self)
        }
        fn step(&mut self, _: &GradStore) -> candle_core::Result<()> {
            Err(candle_core::Error::Msg("the disk is full".into()))
        }
        fn learning_rate(&self) -> f64 {
            0.0
        }
        fn set_learning_rate(&mut self, _: f64) {}
    }
    let (vars, store) = store_of(&[tensor(&[3.0, 4.0], 2, DType::F32)?])?;
    let before = bits_of_gradients(&store, &vars)?;
    let mut opt = ClippedOptimizer::wrap(Failing, vars.clone(), Clip::norm(1.0))?;
    let error = opt.step_report(&store).unwrap_err();
    assert!(matches!(error, Error::Candle(_)));
    assert_eq!(error.to_string(), "the disk is full");
    assert!(opt.last_report().is_none());
    assert_eq!(bits_of_gradients(&store, &vars)?, before);
    Ok(())
}

#[test]
fn a_summary_of_nothing_and_of_nan() -> Result<()> {
    let empty = Summary::default();
    assert_eq!(
        (empty.steps(), empty.skipped(), empty.clipped_fraction()),
        (0, 0, 0.0)
    );
    assert!(empty.median_norm().is_none() && empty.suggest_max_norm().is_empty());

    let (vars, store) = store_of(&[tensor(&[f64::NAN], 1, DType::F32)?])?;
    let mut opt = ClippedOptimizer::wrap(SGD::new(vars.clone(), 0.1)?, vars, Clip::none())?;
    let mut summary = Summary::default();
    summary.add(&opt.step_report(&store)?)?;
    assert_eq!((summary.steps(), summary.skipped()), (1, 1));
    assert!(summary.median_norm().is_none() && summary.suggest_max_norm().is_empty());
    Ok(())
}

#[test]
fn a_clip_value_is_rounded_to_the_gradients_dtype() -> Result<()> {
    // A bound that becomes infinite leaves infinities, one that becomes 0 gives zeros; NaN stays.
    for (dtype, above, below) in [
        (DType::F16, 1e5, 1e-9),
        (DType::BF16, 1e39, 1e-42),
        (DType::F32, 1e39, 1e-46),
    ] {
        for backend in backends() {
            for (bound, right) in [
                (above, [f64::INFINITY, -3.0]),
                (2.0, [2.0, -2.0]),
                (below, [0.0, 0.0]),
            ] {
                let gradient = tensor(&[f64::INFINITY, -3.0, f64::NAN], 3, dtype)?;
                let (vars, mut store) = store_of(&[gradient])?;
                backend::with_backend(backend, || clip_grad_value(&mut store, &vars, bound))?;
                let got = values(store.get(&vars[0]).unwrap())?;
                assert_eq!(got[..2], right, "{dtype:?} {backend:?} {bound:e}");
                assert!(got[2].is_nan(), "{dtype:?} {backend:?} {bound:e}: {got:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_known_norm_keeps_nan_and_infinities_and_says_no_to_what_is_no_norm() -> Result<()> {
    for backend in backends() {
        let gradients = || tensor(&[f64::NAN, f64::INFINITY, 8.0], 3, DType::F32);
        let (vars, mut store) = store_of(&[gradients()?])?;
        backend::with_backend(backend, || {
            clip_grads_with_norm(&mut store, &vars, 1.0, 4.0)
        })?;
        let got = values(store.get(&vars[0]).unwrap())?;
        assert!(got[0].is_nan() && got[1] == f64::INFINITY, "{got:?}");
        assert_close(got[2], 2.0, 1e-6, "scaled");
        for norm in [f64::NAN, f64::INFINITY, -f64::INFINITY, -4.0] {
            let mut store = store_for(&vars, &[gradients()?]);
            let before = bits_of_gradients(&store, &vars)?;
            let error = clip_grads_with_norm(&mut store, &vars, 1.0, norm).unwrap_err();
            assert!(error.to_string().contains("total_norm"), "{error}");
            assert_eq!(bits_of_gradients(&store, &vars)?, before, "{norm}");
        }
    }
    Ok(())
}

#[test]
fn the_watchdog_passes_what_ends_and_sets_the_pool() {
    for threads in [1, 3] {
        Watchdog::new(
            "the_watchdog_passes_what_ends_and_sets_the_pool",
            Duration::from_secs(60),
        )
        .rayon_threads(threads)
        .run(|| {
            assert_eq!(rayon::current_num_threads(), threads);
            Ok(())
        });
    }
}

#[test]
fn the_watchdog_ends_and_reports_what_hangs() {
    let name = "the_watchdog_ends_and_reports_what_hangs";
    let error = Watchdog::new(name, Duration::from_secs(5))
        .case("a thread that waits")
        .outcome(|| {
            println!("before it waits");
            loop {
                std::thread::park();
            }
        })
        .unwrap_err()
        .to_string();
    let start = "the_watchdog_ends_and_reports_what_hangs, a thread that waits, the default pool: \
                 hangs, it has not ended after 5s";
    assert!(error.starts_with(start), "{error}");
    assert!(error.contains("before it waits"), "{error}");
}

#[test]
fn the_watchdog_reports_a_panic() {
    let error = Watchdog::new("the_watchdog_reports_a_panic", Duration::from_secs(60))
        .outcome(|| panic!("a wrong value"))
        .unwrap_err()
        .to_string();
    assert!(error.contains(": failed."), "{error}");
    assert!(error.contains("a wrong value"), "{error}");
}

#[test]
fn the_watchdog_reports_an_error() {
    let error = Watchdog::new("the_watchdog_reports_an_error", Duration::from_secs(60))
        .outcome(|| anyhow::bail!("a wrong state"))
        .unwrap_err()
        .to_string();
    assert!(error.contains(": failed."), "{error}");
    assert!(error.contains("a wrong state"), "{error}");
}

#[test]
fn the_watchdog_reports_a_test_that_is_not_there() {
    let error = Watchdog::new("no_such_test", Duration::from_secs(60))
        .outcome(|| Ok(()))
        .unwrap_err()
        .to_string();
    assert!(error.contains("no test `no_such_test`"), "{error}");
}
