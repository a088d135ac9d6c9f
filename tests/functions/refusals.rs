//! What is refused: by name, and nothing is changed.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::{
    Clip, ClipGradNorm, ClippedOptimizer, Error, NonFinite, NormType, clip_by_global_norm,
    clip_grad_norm, clip_grad_norm_with, clip_grad_value, clip_grads_with_norm, total_norm,
};
use candle_nn::{Optimizer, SGD};
use support::device::{backends, device};
use support::gradients::{bits_of_gradients, bits_of_vars, store_for, store_of, tensor, var_for};

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
