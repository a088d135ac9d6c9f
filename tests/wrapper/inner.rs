//! What the optimizer inside may be, and which Vars it may train.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{
    Clip, ClipGradNorm, ClippedOptimizer, Error, LossScaler, NonFinite, NormType, SkipReason,
    StepPath, clip_by_global_norm, clip_grad_norm, clip_grad_norm_with, clip_grad_value,
    clip_grads_with_norm, total_norm,
};
use candle_nn::{Optimizer, SGD};
use support::gradients::{empty_store, values};

fn pair(name: &str, values: &[f64]) -> Result<(String, Var)> {
    Ok((name.to_string(), Var::new(values, &Device::Cpu)?))
}

/// A loss whose gradient is the Vars' own values.
fn half_square(vars: &[&Var]) -> Result<Tensor> {
    let squares = vars.iter().map(|var| var.sqr()?.sum_all());
    let mut sum = Tensor::new(0f64, &Device::Cpu)?;
    for square in squares {
        sum = (sum + square?)?;
    }
    Ok((sum / 2.0)?)
}

#[test]
fn an_inner_optimizer_that_trains_more_is_refused_by_name() -> Result<()> {
    let (embed, head) = (pair("embed", &[3.0, 4.0])?, pair("head", &[1.0])?);
    let all = vec![embed.clone(), head.clone()];
    let only = vec![head.clone()];
    let error = ClippedOptimizer::wrap(
        Sgd::from_named_vars(all.clone(), 0.1)?,
        only.clone(),
        Clip::none(),
    );
    let error = error.unwrap_err();
    assert!(
        matches!(&error, Error::UnclippedVars { vars } if vars == &["embed"]),
        "{error}"
    );

    // Through `inner_mut`: at the step, and nothing is changed.
    let mut opt = ClippedOptimizer::wrap(
        Sgd::from_named_vars(only.clone(), 0.1)?,
        only.clone(),
        Clip::none(),
    )?;
    *opt.inner_mut() = Sgd::from_named_vars(all.clone(), 0.1)?;
    let loss = half_square(&[&embed.1, &head.1])?;
    for _ in 0..2 {
        let error = opt.backward_step_report(&loss).unwrap_err();
        assert!(
            matches!(&error, Error::UnclippedVars { vars } if vars == &["embed"]),
            "{error}"
        );
    }
    assert_eq!(opt.inner().steps(), 0);
    assert_eq!(embed.1.to_vec1::<f64>()?, [3.0, 4.0]);
    assert_eq!(head.1.to_vec1::<f64>()?, [1.0]);
    *opt.inner_mut() = Sgd::new_lr(vec![], 0.1)?;
    let error = opt.backward_step_report(&loss).unwrap_err();
    assert!(
        matches!(&error, Error::UntrainedVars { vars } if vars == &["head"]),
        "{error}"
    );
    *opt.inner_mut() = Sgd::from_named_vars(only.clone(), 0.1)?;
    opt.backward_step(&loss)?;
    assert_eq!(head.1.to_vec1::<f64>()?, [0.9]);

    // Allowed: a pattern, and the loss's scale goes out of it.
    let (embed, head) = (pair("embed", &[3.0, 4.0])?, pair("head", &[1.0])?);
    let inner = Sgd::from_named_vars(vec![embed.clone(), head.clone()], 0.5)?;
    let clip = Clip::norm(0.5).eps(0.0);
    let opt = ClippedOptimizer::wrap_allow_unclipped(inner, vec![head.clone()], clip, &["em*"])?;
    let mut opt = opt.with_loss_scaler(LossScaler::default())?;
    let report = opt.backward_step_report(&half_square(&[&embed.1, &head.1])?)?;
    assert_eq!(report.total_norm()?, 1.0);
    assert_eq!(embed.1.to_vec1::<f64>()?, [1.5, 2.0]);
    assert_eq!(head.1.to_vec1::<f64>()?, [0.75]);
    Ok(())
}

#[test]
fn vars_that_a_fused_optimizer_does_not_train_count_in_no_norm() -> Result<()> {
    let (body, head) = (pair("body", &[60.0, 80.0])?, pair("head", &[1.0])?);
    let inner = Sgd::from_named_vars(vec![head.clone()], 1.0)?;
    let all = vec![body.clone(), head.clone()];
    let mut opt = ClippedOptimizer::wrap(inner, all, Clip::norm(1.0).eps(0.0))?;
    assert_eq!(opt.vars().names(), ["head"]);
    let report = opt.backward_step_report(&half_square(&[&body.1, &head.1])?)?;
    assert_eq!((report.total_norm()?, report.clip_coef()?), (1.0, 1.0));
    assert_eq!(head.1.to_vec1::<f64>()?, [0.0]); // a step of 1, not of 0.01
    Ok(())
}

#[test]
fn two_vars_of_one_name_are_told_by_wrap() -> Result<()> {
    let twice = vec![pair("w", &[1.0])?, pair("w", &[2.0])?];
    let vars: Vec<Var> = twice.iter().map(|(_, var)| var.clone()).collect();
    let errors = [
        ClippedOptimizer::wrap(SGD::new(vars.clone(), 0.1)?, twice.clone(), Clip::none()).err(),
        ClippedOptimizer::wrap(Sgd::new_lr(vars, 0.1)?, twice, Clip::none()).err(),
    ];
    for error in errors {
        assert!(matches!(error, Some(Error::DuplicateName { name }) if name == "w"));
    }
    Ok(())
}

#[test]
fn a_store_of_other_vars_is_an_error_in_every_free_function() -> Result<()> {
    type Call = fn(&mut GradStore, &[Var]) -> candle_grad_clip::Result<()>;

    let (a, b) = (pair("a", &[3.0, 4.0])?.1, pair("b", &[1.0])?.1);
    let mut grads = half_square(&[&a])?.backward()?;
    let (ours, others) = (vec![b.clone(), a.clone()], vec![b]);
    let calls: [Call; 6] = [
        |grads, vars| clip_grad_norm(grads, vars, 1e9).map(drop),
        |grads, vars| {
            let options = ClipGradNorm {
                max_norm: f64::INFINITY,
                ..ClipGradNorm::default()
            };
            clip_grad_norm_with(grads, vars, &options).map(drop)
        },
        |grads, vars| clip_grads_with_norm(grads, vars, 1e9, 5.0),
        |grads, vars| clip_grad_value(grads, vars, f64::INFINITY),
        |grads, vars| clip_by_global_norm(grads, vars, 1e9, None).map(drop),
        |grads, vars| total_norm(grads, vars, NormType::L2).map(drop),
    ];
    for (i, call) in calls.into_iter().enumerate() {
        let error = call(&mut grads, &others).unwrap_err();
        assert!(
            matches!(error, Error::NoGradients { vars: 1, .. }),
            "{i} {error}"
        );
        assert!(error.to_string().contains("another model"), "{i} {error}");
        call(&mut grads, &ours)?;
        call(&mut grads, &[])?;
        call(&mut empty_store()?, &others)?;
    }
    assert_eq!(values(grads.get(&a).unwrap())?, [3.0, 4.0]);
    Ok(())
}

#[test]
fn a_scaler_unscales_what_another_optimizer_trains_beside() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for backward in [false, true] {
            let var = |values: &[f64]| -> Result<Var> {
                let values = Tensor::new(values, &Device::Cpu)?.to_dtype(dtype)?;
                Ok(Var::from_tensor(&values)?)
            };
            let (known, unknown) = (var(&[1.0])?, var(&[1.0, 2.0])?);
            let sgd = SGD::new(vec![known.clone(), unknown.clone()], 0.5)?;
            let opt = ClippedOptimizer::wrap(sgd, vec![known.clone()], Clip::none())?;
            let mut opt = opt.with_loss_scaler(LossScaler::default().init_scale(1024.0))?;
            let loss = (known.sum_all()? + unknown.sum_all()?)?;
            if backward {
                opt.backward_step(&loss)?;
            } else {
                let grads = opt.scale_loss(&loss)?.backward()?;
                opt.step(&grads)?;
                assert_eq!(values(grads.get(&unknown).unwrap())?, [1024.0, 1024.0]);
            }
            assert_eq!(values(&known)?, [0.5], "{dtype:?} {backward}");
            assert_eq!(values(&unknown)?, [0.5, 1.5], "{dtype:?} {backward}");
        }
    }
    Ok(())
}

#[test]
fn a_skip_of_a_wrapper_inside_is_seen_outside() -> Result<()> {
    let w = pair("w", &[3.0, 4.0])?.1;
    let vars = vec![w.clone()];
    let inner = ClippedOptimizer::wrap(
        Sgd::new_lr(vars.clone(), 0.1)?,
        vars.clone(),
        Clip::skip_above_norm(2.0),
    )?;
    let clip = Clip::norm(1e9).non_finite(NonFinite::Propagate);
    let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip)?;
    let loss = half_square(&[&w])?;
    let report = opt.backward_step_report(&loss)?;
    assert_eq!(report.record()?.skip_reason, Some(SkipReason::LargeNorm));
    assert!(report.skipped()?);
    assert_eq!(report.path(), StepPath::Skipped);
    let record = report.record()?; // as of any skipped step
    assert_eq!((record.clip_coef, record.clipped_norm), (0.0, 0.0));
    assert_eq!((record.was_clipped, record.num_clipped), (false, 0));
    assert_eq!(w.to_vec1::<f64>()?, [3.0, 4.0]);
    let report = opt.step_report(&(loss * 0.25)?.backward()?)?; // a norm of 1.25
    assert!(!report.skipped()?);
    assert_eq!(w.to_vec1::<f64>()?, [2.925, 3.9]);

    // Both clip: to a norm of 1 outside, then to a value of 0.7 inside.
    let w = pair("w", &[3.0, 4.0])?.1;
    let vars = vec![w.clone()];
    let inner = ClippedOptimizer::wrap(
        Sgd::new_lr(vars.clone(), 1.0)?,
        vars.clone(),
        Clip::value(0.7),
    )?;
    let mut opt = ClippedOptimizer::wrap(inner, vars, Clip::norm(1.0).eps(0.0))?;
    opt.backward_step(&half_square(&[&w])?)?;
    let expected = [3.0 - 0.6, 4.0 - 0.7];
    for (value, expected) in w.to_vec1::<f64>()?.into_iter().zip(expected) {
        assert!((value - expected).abs() < 1e-12, "{value}");
    }
    Ok(())
}

#[test]
fn a_scaler_on_a_wrapper_inside_is_refused() -> Result<()> {
    let w = pair("w", &[3.0, 4.0])?.1;
    let vars = vec![w.clone()];
    let wrap = |inner| ClippedOptimizer::wrap(inner, vars.clone(), Clip::none());
    let inner = wrap(Sgd::new_lr(vars.clone(), 0.5)?)?.with_loss_scaler(LossScaler::default())?;
    let outer = |inner| ClippedOptimizer::wrap(inner, vars.clone(), Clip::none());
    let mut opt = outer(inner)?;
    let error = opt.backward_step_report(&half_square(&[&w])?).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the LossScaler on the outermost one"),
        "{error}"
    );
    assert!(opt.last_report().is_none());
    assert_eq!(w.to_vec1::<f64>()?, [3.0, 4.0]);

    let mut opt =
        outer(wrap(Sgd::new_lr(vars.clone(), 0.5)?)?)?.with_loss_scaler(LossScaler::default())?;
    opt.backward_step(&half_square(&[&w])?)?;
    assert_eq!(w.to_vec1::<f64>()?, [1.5, 2.0]);
    Ok(())
}

#[test]
fn a_learning_rate_that_ruins_is_refused_around_any_optimizer() -> Result<()> {
    let w = pair("w", &[3.0, 4.0])?.1;
    let vars = vec![w.clone()];
    let mut other =
        ClippedOptimizer::wrap(SGD::new(vars.clone(), 0.1)?, vars.clone(), Clip::none())?;
    let mut fused = ClippedOptimizer::wrap(Sgd::new_lr(vars.clone(), 0.1)?, vars, Clip::none())?;
    let loss = half_square(&[&w])?;
    for learning_rate in [f64::NAN, -0.1, f64::INFINITY, f64::NEG_INFINITY] {
        other.set_learning_rate(learning_rate);
        let error = other.backward_step_report(&loss).unwrap_err();
        assert!(error.to_string().contains("learning rate is"), "{error}");
        let error = other.step_report(&loss.backward()?).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { .. }), "{error}");
        fused.set_learning_rate(learning_rate);
        let error = fused.backward_step_report(&loss).unwrap_err();
        assert!(
            matches!(error, Error::InvalidOption { name: "lr", .. }),
            "{error}"
        );
        assert_eq!(w.to_vec1::<f64>()?, [3.0, 4.0]);
    }
    assert!(other.last_report().is_none() && fused.last_report().is_none());
    Ok(())
}
