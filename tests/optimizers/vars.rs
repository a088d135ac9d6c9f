//! Which Vars are trained, in which order, and whose state is whose.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, StepPath};
use candle_nn::{Optimizer, ParamsAdamW};
use support::device::{backends, device};
use support::gradients::{bits_of_vars, empty_store, store_for, tensor, values};

use super::fused::{gradients, vars};

/// In another order than the wrapper's, and with more Vars.
#[test]
fn the_wrapper_may_have_other_vars_than_the_optimizer() -> Result<()> {
    let all: Vec<Var> = (0..4)
        .map(|i| Var::new(&[f64::from(i)], device()))
        .collect::<candle_core::Result<_>>()?;
    let mut grads = empty_store()?;
    for var in &all {
        grads.insert(var, Tensor::new(&[8f64], device())?);
    }
    let inner = vec![all[3].clone(), all[1].clone(), all[0].clone()];
    let clipped = vec![
        ("one".to_string(), all[1].clone()),
        ("two".to_string(), all[2].clone()),
        ("three".to_string(), all[3].clone()),
    ];
    let opt = Sgd::new_lr(inner, 1.0)?;
    let mut opt =
        ClippedOptimizer::wrap_allow_unclipped(opt, clipped, Clip::value(2.0), &["var.2"])?;
    assert_eq!(opt.inner().vars().names(), ["three", "one", "var.2"]);
    assert_eq!(opt.vars().names(), ["one", "three"]);
    for step in 1..=2 {
        let report = opt.step_report(&grads)?;
        assert_eq!(report.path(), StepPath::Fused);
        let after: Vec<f64> = all.iter().map(|v| v.to_vec1::<f64>().unwrap()[0]).collect();
        let step = f64::from(step);
        assert_eq!(
            after,
            [-8.0 * step, 1.0 - 2.0 * step, 2.0, 3.0 - 2.0 * step]
        );
    }
    Ok(())
}

#[test]
fn state_follows_its_var_into_another_order() -> Result<()> {
    let vars = vars(DType::F32)?;
    let same = self::vars(DType::F32)?;
    let params = ParamsSgd {
        lr: 0.1,
        momentum: 0.9,
        ..ParamsSgd::default()
    };
    let mut plain = Sgd::new(same.clone(), params)?;
    let mut opt = Sgd::new(vars.clone(), params)?;
    let gradients = |step| gradients(step, DType::F32);
    for step in 0..2 {
        opt.step(&store_for(&vars, &gradients(step)?))?;
        plain.step(&store_for(&same, &gradients(step)?))?;
    }
    let mut turned = vars.clone();
    turned.reverse();
    let mut opt = ClippedOptimizer::wrap(opt, turned, Clip::none())?;
    for step in 2..5 {
        opt.step(&store_for(&vars, &gradients(step)?))?;
        plain.step(&store_for(&same, &gradients(step)?))?;
    }
    assert_eq!(bits_of_vars(&vars)?, bits_of_vars(&same)?);
    Ok(())
}

#[test]
fn another_optimizer_put_in_through_inner_mut_is_fused_too() -> Result<()> {
    let w = Var::new(&[1f32, 2.0], device())?;
    let make = || Sgd::new_lr(vec![w.clone()], 0.5);
    let named = vec![("w".to_string(), w.clone())];
    let mut opt = ClippedOptimizer::wrap(make()?, named, Clip::value(1.0))?;
    *opt.inner_mut() = make()?;
    let report = opt.backward_step_report(&w.sqr()?.sum_all()?)?;
    assert_eq!(report.path(), StepPath::Fused);
    assert_eq!(opt.inner().vars().names(), ["w"]);
    assert_eq!(w.to_vec1::<f32>()?, [0.5, 1.5]);
    Ok(())
}

#[test]
fn empty_and_integer_vars_are_left_alone() -> Result<()> {
    let vars = vec![
        Var::zeros((0, 3), DType::F32, device())?,
        Var::zeros(2, DType::U32, device())?,
        Var::new(&[1f32], device())?,
    ];
    for backend in backends() {
        let mut grads = empty_store()?;
        grads.insert(&vars[0], Tensor::zeros((0, 3), DType::F32, device())?);
        grads.insert(&vars[2], Tensor::new(&[1f32], device())?);
        let opt = AdamW::new(vars.clone(), ParamsAdamW::default())?;
        let mut opt = ClippedOptimizer::wrap(opt, vars.clone(), Clip::norm(0.5))?;
        backend::with_backend(backend, || opt.step(&grads))?;
        AdamW::new(Vec::new(), ParamsAdamW::default())?.step(&empty_store()?)?;
    }
    Ok(())
}

/// PyTorch's AdamW for one number, with its own counter; `None` is a step without a gradient.
fn pytorch_adamw(start: f64, grads: &[Option<f64>], params: &ParamsAdamW) -> f64 {
    let (mut theta, mut m, mut v, mut step) = (start, 0.0, 0.0, 0);
    for g in grads.iter().flatten() {
        step += 1;
        theta *= 1.0 - params.lr * params.weight_decay;
        m = params.beta1 * m + (1.0 - params.beta1) * g;
        v = params.beta2 * v + (1.0 - params.beta2) * g * g;
        let corrected = |x: f64, beta: f64| x / (1.0 - beta.powi(step));
        let (m_hat, v_hat) = (corrected(m, params.beta1), corrected(v, params.beta2));
        theta -= params.lr * m_hat / (v_hat.sqrt() + params.eps);
    }
    theta
}

#[test]
fn each_var_has_its_own_step_counter_as_in_pytorch() -> Result<()> {
    let params = ParamsAdamW {
        lr: 0.1,
        weight_decay: 0.0,
        ..ParamsAdamW::default()
    };
    // One with all gradients, one that is unfrozen at step 1000, one with gaps.
    let grad = |var: usize, step: u64| {
        let is_there = [true, step >= 999, step % 7 < 3][var];
        is_there.then_some(0.5 + (step % 5) as f64 + var as f64)
    };
    for backend in backends() {
        for clipped in [false, true] {
            let vars: Vec<Var> = (0..3)
                .map(|_| Var::from_tensor(&tensor(&[1.0], 1, DType::F64)?))
                .collect::<candle_core::Result<_>>()?;
            let opt = AdamW::new(vars.clone(), params.clone())?;
            let mut opt = ClippedOptimizer::wrap(opt, vars.clone(), Clip::none())?;
            backend::with_backend(backend, || -> Result<()> {
                for step in 0..1003 {
                    let mut grads = store_for(&vars, &[]);
                    for (i, var) in vars.iter().enumerate() {
                        if let Some(g) = grad(i, step) {
                            grads.insert(var, tensor(&[g], 1, DType::F64)?);
                        }
                    }
                    if clipped {
                        opt.step(&grads)?;
                    } else {
                        opt.inner_mut().step(&grads)?;
                    }
                    if step == 999 {
                        let moved = 1.0 - values(&vars[1])?[0];
                        assert!((moved - 0.1).abs() < 1e-8, "{backend:?}: moved {moved}");
                    }
                }
                Ok(())
            })?;
            for (i, var) in vars.iter().enumerate() {
                let grads: Vec<Option<f64>> = (0..1003).map(|step| grad(i, step)).collect();
                let (got, right) = (values(var)?[0], pytorch_adamw(1.0, &grads, &params));
                assert!(
                    (got - right).abs() <= 1e-9 * right.abs(),
                    "{backend:?}, Var {i}: {got}, expected {right}"
                );
            }
            assert_eq!(opt.inner().steps(), 1003);
        }
    }
    Ok(())
}

fn one_step(opt: &mut impl Optimizer, var: &Var, gradient: &Tensor) -> Result<()> {
    let (vars, gradients) = (std::slice::from_ref(var), std::slice::from_ref(gradient));
    Ok(opt.step(&store_for(vars, gradients))?)
}

#[test]
fn weights_set_from_outside_are_those_that_train_on() -> Result<()> {
    for (backend, dtype) in backends()
        .into_iter()
        .flat_map(|backend| [(backend, DType::BF16), (backend, DType::F16)])
    {
        // More than a block of the kernels, so that some elements are set and others stay.
        let len = 2_000;
        let ones = tensor(&vec![1.0; len], len, dtype)?;
        let w = Var::from_tensor(&ones)?;
        let vars = vec![w.clone()];
        let params = ParamsAdamW {
            lr: 1e-3,
            weight_decay: 0.0,
            ..ParamsAdamW::default()
        };
        let mut adamw = AdamW::new(vars.clone(), params)?.master_weights(true);
        let sgd_w = Var::from_tensor(&ones)?;
        let mut sgd = Sgd::new_lr(vec![sgd_w.clone()], 1e-3)?.master_weights(true);
        let mut set = vec![1.0; len];
        set[1] = 5.0;
        set[1999] = -5.0;
        set[700] = f64::NAN;
        backend::with_backend(backend, || -> Result<()> {
            let mut step = || -> Result<()> {
                one_step(&mut adamw, &w, &ones)?;
                one_step(&mut sgd, &sgd_w, &ones)
            };
            step()?;
            for var in [&w, &sgd_w] {
                let mut now = values(var)?;
                for i in [1, 700, 1999] {
                    now[i] = set[i];
                }
                var.set(&tensor(&now, len, dtype)?)?;
            }
            step()?;
            step()?;
            Ok(())
        })?;
        // What a weight was, less 0.001 in each step since, rounded once.
        let rounded = |x: f64| values(&tensor(&[x], 1, dtype).unwrap()).unwrap()[0];
        for var in [&w, &sgd_w] {
            let got = values(var)?;
            let what = format!("{backend:?}, {dtype:?}");
            assert_eq!(got[0], rounded(1.0 - 3e-3), "{what}: not set");
            assert_eq!(got[1], rounded(5.0 - 2e-3), "{what}: set");
            assert_eq!(got[1999], rounded(-5.0 - 2e-3), "{what}: set");
            assert!(got[700].is_nan(), "{what}");
        }
        // A NaN that is set away is gone.
        for (var, nan) in [(&w, 700), (&sgd_w, 700)] {
            let mut now = values(var)?;
            now[nan] = 2.0;
            var.set(&tensor(&now, len, dtype)?)?;
        }
        backend::with_backend(backend, || one_step(&mut sgd, &sgd_w, &ones))?;
        assert_eq!(values(&sgd_w)?[700], rounded(2.0 - 1e-3));
        backend::with_backend(backend, || one_step(&mut adamw, &w, &ones))?;
        assert_eq!(values(&w)?[700], rounded(2.0 - 1e-3));
    }
    Ok(())
}
