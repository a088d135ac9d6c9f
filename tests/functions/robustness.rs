//! No panic, and the right answer, for anything that the types allow.
//!
//! A gradient on another device than its Var needs a second device: it can't be tested on CPU.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::{
    Clip, ClipGradNorm, ClippedOptimizer, Error, NonFinite, NormStatistics, NormType,
    clip_by_global_norm, clip_grad_norm, clip_grad_norm_with, clip_grad_value,
    clip_grads_with_norm, total_norm,
};
use candle_nn::{Optimizer, SGD};
use support::device::{backends, device};
use support::gradients::{
    FLOATS, all_values, bits, bits_of_gradients, empty_store, gradients_of, store_for, store_of,
    tensor, values,
};
use support::optimizers::{Failing, Recorder};
use support::oracle::assert_close;

/// Every free function and a step of a wrapped optimizer, on copies of the same gradients. Returns
/// the norm that all agree on.
pub(super) fn everything(gradients: &[Tensor]) -> Result<f64> {
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
    let mut empty = empty_store()?;
    assert_eq!(total_norm(&empty, &vars, NormType::L2)?, 0.0);
    assert_eq!(clip_grad_norm(&mut empty, &vars, 1.0)?, 0.0);
    assert_eq!(clip_grad_norm(&mut empty, &vars, 0.0)?, 0.0);
    clip_grad_value(&mut empty, &vars, 1.0)?;
    assert!(empty.get(&vars[0]).is_none());
    let mut opt = ClippedOptimizer::wrap(SGD::new(vec![], 0.1)?, vars.to_vec(), Clip::norm(1.0))?;
    assert_eq!(opt.step_report(&empty)?.missing_grads(), ["var.0"]);
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
    assert_eq!(report.record()?.param_norms, [("embed".to_string(), 5.0)]);
    let weights = values(&vars[0])?;
    assert_close(weights[0], -1.5, 1e-6, "one step");
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
    let mut store = empty_store()?;
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
    let (vars, store) = store_of(&[tensor(&[3.0, 4.0], 2, DType::F32)?])?;
    let before = bits_of_gradients(&store, &vars)?;
    let mut opt = ClippedOptimizer::wrap(
        Failing::new(vars.clone(), 0.1)?,
        vars.clone(),
        Clip::norm(1.0),
    )?;
    opt.inner_mut().fails = true;
    let error = opt.step_report(&store).unwrap_err();
    assert!(matches!(error, Error::Candle(_)));
    assert_eq!(error.to_string(), "the disk is full");
    assert!(opt.last_report().is_none());
    assert_eq!(bits_of_gradients(&store, &vars)?, before);
    Ok(())
}

#[test]
fn a_summary_of_nothing_and_of_nan() -> Result<()> {
    let empty = NormStatistics::default();
    assert_eq!(
        (empty.steps(), empty.skipped(), empty.clipped_fraction()),
        (0, 0, 0.0)
    );
    assert!(empty.median_norm().is_none() && empty.suggest_max_norm().is_empty());

    let (vars, store) = store_of(&[tensor(&[f64::NAN], 1, DType::F32)?])?;
    let mut opt = ClippedOptimizer::wrap(SGD::new(vars.clone(), 0.1)?, vars, Clip::none())?;
    let mut summary = NormStatistics::default();
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
