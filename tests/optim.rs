//! The fused optimizers: those of candle to the bit, in place, with nothing changed where a step fails.
#![allow(clippy::unwrap_used)]

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NonFinite, StepPath};
use candle_nn::{Optimizer, ParamsAdamW};
use support::device::{backends, device};
use support::gradients::{bits, bits_of_vars, random_values, store_for, tensor, values};

const SHAPES: [&[usize]; 5] = [&[40, 30], &[7], &[], &[2, 3, 5], &[1025]];

fn tensors(seed: u64, dtype: DType) -> Result<Vec<Tensor>> {
    let make = |(i, shape): (usize, &&[usize])| {
        let values = random_values(shape.iter().product(), 100 * seed + i as u64);
        Ok(tensor(&values, *shape, dtype)?)
    };
    SHAPES.iter().enumerate().map(make).collect()
}

fn vars(dtype: DType) -> Result<Vec<Var>> {
    let vars = tensors(7, dtype)?.into_iter();
    Ok(vars
        .map(|t| Var::from_tensor(&t))
        .collect::<candle_core::Result<_>>()?)
}

/// Gradients of very different sizes, among them zeros.
fn gradients(step: u64, dtype: DType) -> Result<Vec<Tensor>> {
    let gain = [1.0, 1e-3, 30.0, 0.0, 1e4][step as usize % 5];
    let scaled = tensors(step + 1000, dtype)?.into_iter().map(|t| t * gain);
    Ok(scaled.collect::<candle_core::Result<_>>()?)
}

/// The bits, but that a zero may have another sign: candle's `affine` adds a 0, which makes -0 a +0.
fn bits_but_zero(vars: &[Var]) -> Result<Vec<Vec<u64>>> {
    let mut all = Vec::new();
    for var in vars {
        all.push(bits(&(var.as_tensor() + 0.0)?)?);
    }
    Ok(all)
}

/// Trains both for 1,000 steps, and compares after each; `with_gaps` if some Vars have no gradient in some steps.
fn follows<A: Optimizer, B: Optimizer>(
    dtype: DType,
    with_gaps: bool,
    theirs: impl Fn(Vec<Var>) -> candle_core::Result<A>,
    ours: impl Fn(Vec<Var>) -> candle_core::Result<B>,
) -> Result<()> {
    let (a, b) = (vars(dtype)?, vars(dtype)?);
    let (mut theirs, mut ours) = (theirs(a.clone())?, ours(b.clone())?);
    for step in 0..1000 {
        let mut gradients = gradients(step, dtype)?;
        if with_gaps && step % 3 == 1 {
            gradients.truncate(3); // the other Vars get none
        }
        theirs.step(&store_for(&a, &gradients))?;
        ours.step(&store_for(&b, &gradients))?;
        if step % 50 == 49 || step < 3 {
            assert_eq!(
                bits_but_zero(&b)?,
                bits_but_zero(&a)?,
                "{dtype:?}, step {step}"
            );
        }
    }
    Ok(())
}

#[test]
fn adamw_is_candles_to_the_bit() -> Result<()> {
    let params = ParamsAdamW {
        lr: 0.02,
        weight_decay: 0.05,
        ..ParamsAdamW::default()
    };
    for dtype in [DType::F32, DType::F64] {
        follows(
            dtype,
            false, // candle counts the steps of all Vars at once
            |vars| candle_nn::AdamW::new(vars, params.clone()),
            |vars| AdamW::new(vars, params.clone()),
        )?;
    }
    Ok(())
}

#[test]
fn sgd_is_candles_to_the_bit() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        follows(
            dtype,
            true,
            |vars| candle_nn::SGD::new(vars, 0.01),
            |vars| Sgd::new_lr(vars, 0.01),
        )?;
    }
    Ok(())
}

/// Fused in one wrapper, hidden from the other, which edits the gradients first.
#[test]
fn a_fused_step_is_clipping_and_then_stepping_to_the_bit() -> Result<()> {
    struct Hidden(AdamW);
    impl Optimizer for Hidden {
        type Config = ParamsAdamW;
        fn new(vars: Vec<Var>, config: ParamsAdamW) -> candle_core::Result<Self> {
            Ok(Self(AdamW::new(vars, config)?))
        }
        fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
            self.0.step(grads)
        }
        fn learning_rate(&self) -> f64 {
            self.0.learning_rate()
        }
        fn set_learning_rate(&mut self, lr: f64) {
            self.0.set_learning_rate(lr);
        }
    }
    let clips = [
        Clip::norm(1.0),
        Clip::value(0.25),
        Clip::norm(1.0).non_finite(NonFinite::Zero),
        Clip::value(0.25).non_finite(NonFinite::Zero),
    ];
    for dtype in [DType::F32, DType::F64] {
        for clip in &clips {
            let (a, b) = (vars(dtype)?, vars(dtype)?);
            let hidden = Hidden::new(a.clone(), ParamsAdamW::default())?;
            let mut hidden = ClippedOptimizer::wrap(hidden, a.clone(), clip.clone())?;
            let fused = AdamW::new(b.clone(), ParamsAdamW::default())?;
            let mut fused = ClippedOptimizer::wrap(fused, b.clone(), clip.clone())?;
            for step in 0..20 {
                let mut gradients = gradients(step, dtype)?;
                if step == 7 && clip.to_string() != "none" {
                    gradients[1] = (&gradients[1] / 0.0)?; // infinite, and NaN: skipped or zeroed
                }
                let theirs = hidden.step_report(&store_for(&a, &gradients))?;
                let ours = fused.step_report(&store_for(&b, &gradients))?;
                assert_eq!(ours.clip_coef()?, theirs.clip_coef()?);
                if ours.skipped()? {
                    assert_eq!(ours.to_record()?.path, StepPath::Skipped);
                } else {
                    assert_eq!(ours.path(), StepPath::Fused);
                    assert_ne!(theirs.path(), StepPath::Fused);
                }
                assert_eq!(
                    bits_of_vars(&b)?,
                    bits_of_vars(&a)?,
                    "{dtype:?} {clip} {step}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn halves_are_updated_in_f32_and_rounded_once() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let half = vars(dtype)?;
        let mut opt = AdamW::new_lr(half.clone(), 0.01)?;
        // The same in f32, with the parameters rounded after each step by hand.
        let mut by_hand = Vec::new();
        for var in &half {
            by_hand.push(Var::from_tensor(&var.to_dtype(DType::F32)?)?);
        }
        let mut f32_opt = candle_nn::AdamW::new_lr(by_hand.clone(), 0.01)?;
        // And with a copy that is not rounded.
        let masked = vars(dtype)?;
        let mut master_opt = AdamW::new_lr(masked.clone(), 0.01)?.master_weights(true);
        let mut master = Vec::new();
        for var in &half {
            master.push(Var::from_tensor(&var.to_dtype(DType::F32)?)?);
        }
        let mut f32_master_opt = candle_nn::AdamW::new_lr(master.clone(), 0.01)?;
        for step in 0..50 {
            let gradients = gradients(step, dtype)?;
            let mut wide = Vec::new();
            for gradient in &gradients {
                wide.push(gradient.to_dtype(DType::F32)?);
            }
            opt.step(&store_for(&half, &gradients))?;
            f32_opt.step(&store_for(&by_hand, &wide))?;
            for var in &by_hand {
                var.set(&var.to_dtype(dtype)?.to_dtype(DType::F32)?)?;
            }
            master_opt.step(&store_for(&masked, &gradients))?;
            f32_master_opt.step(&store_for(&master, &wide))?;
            for i in 0..half.len() {
                let expected = (by_hand[i].as_tensor() + 0.0)?.to_dtype(dtype)?;
                assert_eq!(
                    values(&half[i])?,
                    values(&expected)?,
                    "{dtype:?} {step} {i}"
                );
                let expected = master[i].to_dtype(dtype)?;
                assert_eq!(
                    values(&masked[i])?,
                    values(&expected)?,
                    "{dtype:?} {step} {i}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn vars_are_updated_in_place() -> Result<()> {
    let w = Var::new(&[1f32, 2.0], device())?;
    let clone = w.as_detached_tensor();
    Sgd::new_lr(vec![w.clone()], 0.5)?.backward_step(&w.sum_all()?)?;
    assert_eq!(clone.to_vec1::<f32>()?, [0.5, 1.5]);
    Ok(())
}

/// A gradient that is a Var, its own or another: read as it was before the step.
#[test]
fn gradients_that_share_storage_with_vars_are_read_before_anything_is_written() -> Result<()> {
    for backend in backends() {
        let a = Var::new(&[1f32, 2.0], device())?;
        let b = Var::new(&[10f32, 20.0], device())?;
        let mut grads = GradStore::default();
        grads.insert(&a, b.as_detached_tensor());
        grads.insert(&b, b.as_tensor().clone());
        let vars = vec![a.clone(), b.clone()];
        let mut opt =
            ClippedOptimizer::wrap(Sgd::new_lr(vars.clone(), 0.5)?, vars, Clip::norm(1e9))?;
        backend::with_backend(backend, || opt.step(&grads))?;
        assert_eq!(a.to_vec1::<f32>()?, [-4.0, -8.0], "{backend:?}");
        assert_eq!(b.to_vec1::<f32>()?, [5.0, 10.0], "{backend:?}");
    }
    Ok(())
}

/// In another order than the wrapper's, and with more Vars.
#[test]
fn the_wrapper_may_have_other_vars_than_the_optimizer() -> Result<()> {
    let all: Vec<Var> = (0..4)
        .map(|i| Var::new(&[f64::from(i)], device()))
        .collect::<candle_core::Result<_>>()?;
    let mut grads = GradStore::default();
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
fn a_step_that_fails_or_is_skipped_changes_nothing() -> Result<()> {
    for backend in backends() {
        let vars = vars(DType::F32)?;
        let same = self::vars(DType::F32)?;
        let params = ParamsAdamW::default();
        let clip = Clip::norm(1.0);
        let make = |vars: &[Var]| -> Result<ClippedOptimizer<AdamW>> {
            let opt = AdamW::new(vars.to_vec(), params.clone())?;
            Ok(ClippedOptimizer::wrap(opt, vars.to_vec(), clip.clone())?)
        };
        let (mut opt, mut undisturbed) = (make(&vars)?, make(&same)?);
        backend::with_backend(backend, || -> Result<()> {
            for step in 0..6 {
                let good = gradients(step + 5 * step, DType::F32)?;
                let mut bad = good.clone();
                bad[4] = (&bad[4] / 0.0)?;
                assert!(opt.step_report(&store_for(&vars, &bad))?.skipped()?);
                opt.set_clip(clip.clone().non_finite(NonFinite::Error))?;
                let error = opt.step_report(&store_for(&vars, &bad)).unwrap_err();
                assert!(matches!(error, Error::NonFinite { .. }), "{error}");
                opt.set_clip(clip.clone())?;
                bad[4] = Tensor::zeros(3, DType::F32, device())?;
                let error = opt.step_report(&store_for(&vars, &bad)).unwrap_err();
                assert!(matches!(error, Error::Mismatch { .. }), "{error}");
                opt.set_learning_rate(f64::NAN);
                let error = opt.step_report(&store_for(&vars, &good)).unwrap_err();
                assert!(error.to_string().starts_with("lr is NaN"), "{error}");
                opt.set_learning_rate(params.lr);

                assert_eq!(opt.inner().steps(), step);
                opt.step(&store_for(&vars, &good))?;
                undisturbed.step(&store_for(&same, &good))?;
                assert_eq!(bits_of_vars(&vars)?, bits_of_vars(&same)?, "{backend:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn bad_hyper_parameters_are_refused_by_name() -> Result<()> {
    let adamw = |edit: fn(&mut ParamsAdamW)| {
        let mut params = ParamsAdamW::default();
        edit(&mut params);
        AdamW::named(Vec::<Var>::new(), params)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(adamw(|p| p.lr = -1.0).starts_with("lr is -1"));
    assert!(adamw(|p| p.beta1 = 1.0).starts_with("beta1 is 1"));
    assert!(adamw(|p| p.beta2 = f64::NAN).starts_with("beta2 is NaN"));
    assert!(adamw(|p| p.eps = -1e-9).starts_with("eps is"));
    assert!(adamw(|p| p.weight_decay = f64::INFINITY).starts_with("weight_decay is inf"));
    let sgd = |params: ParamsSgd| {
        Sgd::named(Vec::<Var>::new(), params)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    let params = ParamsSgd {
        nesterov: true,
        ..ParamsSgd::default()
    };
    assert!(sgd(params).contains("Nesterov"));
    let dampened = ParamsSgd {
        momentum: 0.5,
        dampening: 0.1,
        ..params
    };
    assert!(sgd(dampened).contains("Nesterov"));
    assert!(sgd(f64::NAN.into()).starts_with("lr is NaN"));
    let mut opt = Sgd::new_lr(Vec::new(), 0.1)?;
    let with_momentum = ParamsSgd {
        momentum: 0.5,
        ..ParamsSgd::from(0.1)
    };
    assert!(opt.set_params(with_momentum).is_err());
    assert_eq!(opt.params(), &ParamsSgd::from(0.1));
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
        let mut grads = GradStore::default();
        grads.insert(&vars[0], Tensor::zeros((0, 3), DType::F32, device())?);
        grads.insert(&vars[2], Tensor::new(&[1f32], device())?);
        let opt = AdamW::new(vars.clone(), ParamsAdamW::default())?;
        let mut opt = ClippedOptimizer::wrap(opt, vars.clone(), Clip::norm(0.5))?;
        backend::with_backend(backend, || opt.step(&grads))?;
        AdamW::new(Vec::new(), ParamsAdamW::default())?.step(&GradStore::default())?;
    }
    Ok(())
}

/// PyTorch's AdamW for one number, with a counter of its own; `None` is a step without a gradient.
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
                adamw.step(&store_for(&vars, std::slice::from_ref(&ones)))?;
                sgd.step(&store_for(
                    std::slice::from_ref(&sgd_w),
                    std::slice::from_ref(&ones),
                ))?;
                Ok(())
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
        backend::with_backend(backend, || {
            sgd.step(&store_for(
                std::slice::from_ref(&sgd_w),
                std::slice::from_ref(&ones),
            ))
        })?;
        assert_eq!(values(&sgd_w)?[700], rounded(2.0 - 1e-3));
        backend::with_backend(backend, || {
            adamw.step(&store_for(&vars, std::slice::from_ref(&ones)))
        })?;
        assert_eq!(values(&w)?[700], rounded(2.0 - 1e-3));
    }
    Ok(())
}

/// f32 has no 1e-46, and the square of 1e-25 is 0 there: the update stays bounded, and without a gradient there is none.
#[test]
fn an_eps_that_is_zero_makes_no_nan() -> Result<()> {
    for backend in backends() {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            for eps in [0.0, 1e-46, 5e-324] {
                let params = ParamsAdamW {
                    lr: 0.5,
                    eps,
                    weight_decay: 0.0,
                    ..ParamsAdamW::default()
                };
                let w = Var::from_tensor(&tensor(&[1.0, 1.0, 1.0], 3, dtype)?)?;
                let vars = vec![w.clone()];
                let mut opt = AdamW::new(vars.clone(), params)?;
                let small = if dtype == DType::F64 { 1e-200 } else { 1e-25 };
                let grads = store_for(&vars, &[tensor(&[0.0, 3.0, small], 3, dtype)?]);
                backend::with_backend(backend, || opt.step(&grads))?;
                let got = values(&w)?;
                let what = format!("{backend:?}, {dtype:?}, {eps:e}: {got:?}");
                assert_eq!(got[0], 1.0, "{what}");
                assert!((got[1] - 0.5).abs() < 1e-6, "{what}");
                assert!((got[2] - 1.0).abs() <= 0.5, "{what}");
            }
        }
    }
    Ok(())
}

#[test]
fn numbers_out_of_range_are_refused_however_they_come() -> Result<()> {
    let refused = |params: ParamsSgd| {
        let named = Sgd::named(Vec::<Var>::new(), params).map(|_| ());
        let mut opt = Sgd::named(
            Vec::<Var>::new(),
            ParamsSgd {
                momentum: 0.5,
                ..ParamsSgd::default()
            },
        )
        .unwrap();
        let before = *opt.params();
        let set = opt.set_params(params);
        assert_eq!(opt.params(), &before);
        let (named, set) = (named.unwrap_err(), set.unwrap_err());
        assert_eq!(named.to_string(), set.to_string());
        named.to_string()
    };
    let momentum = ParamsSgd {
        momentum: 0.5,
        ..ParamsSgd::default()
    };
    for dampening in [5.0, 1.0 + f64::EPSILON, -0.1, f64::NAN, f64::INFINITY] {
        let error = refused(ParamsSgd {
            dampening,
            ..momentum
        });
        assert!(error.starts_with("dampening is"), "{error}");
    }
    for (name, bad) in [
        (
            "lr",
            ParamsSgd {
                lr: -0.1,
                ..momentum
            },
        ),
        (
            "momentum",
            ParamsSgd {
                momentum: -0.1,
                ..momentum
            },
        ),
        (
            "weight_decay",
            ParamsSgd {
                weight_decay: f64::NAN,
                ..momentum
            },
        ),
    ] {
        let error = refused(bad);
        assert!(error.starts_with(&format!("{name} is")), "{error}");
    }
    let all = ParamsSgd {
        dampening: 1.0,
        ..momentum
    };
    Sgd::named(Vec::<Var>::new(), all)?; // as in PyTorch

    // A learning rate is checked by the step, which changes nothing.
    let w = Var::from_tensor(&tensor(&[1.0], 1, DType::F32)?)?;
    let vars = vec![w.clone()];
    let grads = store_for(&vars, &[tensor(&[1.0], 1, DType::F32)?]);
    let wrapped = |opt| ClippedOptimizer::wrap(opt, vars.clone(), Clip::norm(1.0));
    let mut adamw = wrapped(AdamW::new_lr(vars.clone(), 0.1)?)?;
    let mut sgd = ClippedOptimizer::wrap(
        Sgd::new(vars.clone(), momentum)?,
        vars.clone(),
        Clip::norm(1.0),
    )?;
    for lr in [f64::NAN, -1.0, f64::INFINITY, 1e39] {
        adamw.set_learning_rate(lr);
        sgd.set_learning_rate(lr);
        for error in [adamw.step(&grads), sgd.step(&grads)] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains("lr is"), "{error}");
        }
        assert_eq!((adamw.inner().steps(), sgd.inner().steps()), (0, 0));
        assert_eq!(values(&w)?, [1.0]);
    }
    // Each is fine, their product is not; and an eps that is infinite in f32 would freeze.
    let mut opt = AdamW::new_lr(vars.clone(), 1e30)?;
    opt.set_params(ParamsAdamW {
        lr: 1e30,
        weight_decay: 1e30,
        ..ParamsAdamW::default()
    });
    let error = opt.step(&grads).unwrap_err().to_string();
    assert!(error.contains("lr times weight_decay is"), "{error}");
    opt.set_params(ParamsAdamW {
        eps: 1e39,
        ..ParamsAdamW::default()
    });
    let error = opt.step(&grads).unwrap_err().to_string();
    assert!(error.contains("eps is"), "{error}");
    assert_eq!(values(&w)?, [1.0]);
    Ok(())
}
