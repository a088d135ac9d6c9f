//! The text of every error is whole, and stays so in candle's error and in `anyhow`'s.

use candle_core::{DType, Tensor, Var};
use candle_grad_clip::{
    Clip, ClipGradNorm, ClippedOptimizer, Error, NormType, clip_grad_norm, clip_grad_norm_with,
    clip_grad_value, clip_grads_with_norm, loss, optim, total_norm,
};
use candle_nn::{Optimizer, SGD};
use support::device::device;
use support::gradients::{store_of, tensor};

fn vars_of_two() -> candle_grad_clip::Result<Vec<Var>> {
    let one = || Var::zeros(1, DType::F32, device());
    Ok(vec![one()?, one()?])
}

/// Errors of options, with their texts.
fn errors_of_options() -> candle_grad_clip::Result<Vec<(Error, &'static str)>> {
    let (vars, mut store) = store_of(&[tensor(&[3.0, 4.0], 2, DType::F32)?])?;
    let options = ClipGradNorm {
        eps: -1.0,
        ..ClipGradNorm::default()
    };
    let mut errors = vec![
        (
            clip_grad_norm(&mut store, &vars, -1.0).unwrap_err(),
            "max_norm is -1, expected 0 or above",
        ),
        (
            clip_grad_norm(&mut store, &vars, f64::NAN).unwrap_err(),
            "max_norm is NaN, expected 0 or above",
        ),
        (
            clip_grad_value(&mut store, &vars, -0.5).unwrap_err(),
            "clip_value is -0.5, expected 0 or above",
        ),
        (
            clip_grads_with_norm(&mut store, &vars, 1.0, f64::INFINITY).unwrap_err(),
            "total_norm is inf, expected 0 or a finite value above: gradients with that norm can't \
             be scaled by it",
        ),
        (
            clip_grad_norm_with(&mut store, &vars, &options).unwrap_err(),
            "eps is -1, expected 0 or a finite value above",
        ),
        (
            total_norm(&store, &vars, NormType::P(-2.0)).unwrap_err(),
            "norm_type is -2, expected 1, 2, inf or any p > 0",
        ),
    ];

    let mut opt = ClippedOptimizer::wrap(SGD::new(vars.clone(), 0.1)?, vars.clone(), Clip::none())?;
    let zero = "max_norm is 0, expected a value above 0: 0 would set every gradient to 0; \
                Clip::none() turns clipping off";
    errors.push((opt.set_clip(Clip::norm(0.0)).unwrap_err(), zero));
    let negative = "clip_value is -1, expected a value above 0";
    errors.push((opt.set_clip(Clip::value(-1.0)).unwrap_err(), negative));
    Ok(errors)
}

/// Those of gradients and Vars.
fn errors_of_gradients() -> candle_grad_clip::Result<Vec<(Error, &'static str)>> {
    let mut errors = Vec::new();
    let (vars, mut bad) = store_of(&[
        tensor(&[3.0, 4.0], 2, DType::F32)?,
        tensor(&[f64::NAN, 1.0, f64::INFINITY, f64::NAN], 4, DType::F32)?,
        tensor(&[f64::INFINITY], 1, DType::F32)?,
    ])?;
    errors.push((
        clip_grad_norm(&mut bad, &vars, 1.0).unwrap_err(),
        "the gradients are not finite, so their 2-norm is not either: the first bad Var is var.1 \
         with 2 NaN and 1 infinite of 4 values (4 bad values in all); nothing was changed; look at the data and the learning rate, or \
         take another NonFinite policy",
    ));
    let clip = Clip::none().max_skips(0);
    let mut opt = ClippedOptimizer::wrap(SGD::new(vars.clone(), 0.1)?, vars, clip)?;
    errors.push((
        opt.step_report(&bad).unwrap_err(),
        "gradients were not finite in 1 step(s) in a row, more than max_skips = 0: the first bad Var \
         is var.1; the weights are as they were before the first of them; lower the learning \
         rate or look at the data",
    ));

    let var = Var::zeros(2, DType::F32, device())?;
    let mut of_another = var.sqr()?.sum_all()?.backward()?;
    errors.push((
        clip_grad_norm(&mut of_another, &vars_of_two()?, 1.0).unwrap_err(),
        "the store has 1 gradient(s), but none for any of the 2 Var(s): expected those of backward() on a loss of these \
         Vars; are they Vars of another model?",
    ));
    let [v, w] = &vars_of_two()?[..] else {
        unreachable!("there are two")
    };
    let inner = optim::Sgd::from_named_vars(
        vec![("v".to_string(), v.clone()), ("w".to_string(), w.clone())],
        0.1,
    )?;
    let only = vec![("w".to_string(), w.clone())];
    errors.push((
        ClippedOptimizer::wrap(inner, only, Clip::none()).unwrap_err(),
        "the inner optimizer trains 1 Var(s) that the wrapper was not given: v; expected all that it trains: wrap with them \
         too, or name them in ClippedOptimizer::wrap_allow_unclipped",
    ));
    let x = var.as_tensor();
    errors.push((
        loss::weighted_power(x, x, x, 0.5).unwrap_err(),
        "power is 0.5, expected 1 or a finite value above: below 1 the gradient is infinite at 0",
    ));
    Ok(errors)
}

fn every_error() -> candle_grad_clip::Result<Vec<(Error, &'static str)>> {
    let mut errors = errors_of_options()?;
    errors.extend(errors_of_gradients()?);
    Ok(errors)
}

#[test]
fn texts_are_whole() -> candle_grad_clip::Result<()> {
    for (error, text) in every_error()? {
        assert_eq!(error.to_string(), text);
    }
    Ok(())
}

#[test]
fn candle_keeps_the_whole_text() -> candle_grad_clip::Result<()> {
    for (error, text) in every_error()? {
        // With RUST_BACKTRACE set, candle appends a backtrace to every error.
        let candle = candle_core::Error::from(error).to_string();
        assert!(candle.starts_with(text), "{candle}");
    }
    Ok(())
}

#[test]
fn an_error_of_candle_stays_the_same() -> candle_grad_clip::Result<()> {
    let x = Tensor::zeros(2, DType::F32, device())?;
    let candle = x.reshape(3).unwrap_err();
    let text = candle.to_string();
    let ours = Error::from(candle);
    assert_eq!(ours.to_string(), text);
    assert_eq!(candle_core::Error::from(ours).to_string(), text);
    Ok(())
}

#[test]
fn question_mark_works_in_every_result() {
    fn ours() -> candle_grad_clip::Result<()> {
        let (vars, mut store) = store_of(&[tensor(&[1.0], 1, DType::F32)?])?;
        clip_grad_norm(&mut store, &vars, -1.0)?;
        Ok(())
    }
    fn candle() -> candle_core::Result<()> {
        let x = Tensor::zeros(1, DType::F32, device())?;
        x.reshape(1)?;
        ours()?;
        Ok(())
    }
    fn anyhow() -> anyhow::Result<()> {
        Tensor::zeros(1, DType::F32, device())?;
        ours()?;
        Ok(())
    }
    let text = "max_norm is -1, expected 0 or above";
    assert_eq!(ours().unwrap_err().to_string(), text);
    assert!(candle().unwrap_err().to_string().starts_with(text));
    let error = anyhow().unwrap_err();
    assert_eq!(error.to_string(), text);
    assert!(matches!(
        error.downcast_ref(),
        Some(Error::InvalidOption {
            name: "max_norm",
            ..
        })
    ));
}

#[test]
fn errors_cross_threads() {
    fn is_thread_safe<T: Send + Sync + 'static>() {}
    is_thread_safe::<Error>();
}
