//! The fused optimizers: those of candle to the bit, in place, with nothing changed where a step
//! fails.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, NonFinite, StepPath};
use candle_nn::{Optimizer, ParamsAdamW};
use support::device::{backends, device};
use support::gradients::{
    bits, bits_of_vars, empty_store, store_for, tensor, tensors_of, values, vars_of,
};

const SHAPES: [&[usize]; 5] = [&[40, 30], &[7], &[], &[2, 3, 5], &[1025]];

pub(super) fn vars(dtype: DType) -> Result<Vec<Var>> {
    Ok(vars_of(&tensors_of(&SHAPES, 700, &[dtype])?)?)
}

/// Gradients of very different sizes, among them zeros.
pub(super) fn gradients(step: u64, dtype: DType) -> Result<Vec<Tensor>> {
    let gain = [1.0, 1e-3, 30.0, 0.0, 1e4][step as usize % 5];
    let gradients = tensors_of(&SHAPES, 100 * (step + 1000), &[dtype])?;
    let scaled = gradients.into_iter().map(|t| t * gain);
    Ok(scaled.collect::<candle_core::Result<_>>()?)
}

/// The bits, but that a zero may have another sign: candle's `affine` adds a 0, which makes -0 a
/// +0.
fn bits_but_zero(vars: &[Var]) -> Result<Vec<Vec<u64>>> {
    let mut all = Vec::new();
    for var in vars {
        all.push(bits(&(var.as_tensor() + 0.0)?)?);
    }
    Ok(all)
}

/// Trains both for 1,000 steps, and compares after each; `with_gaps` if some Vars have no gradient
/// in some steps.
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
                    assert_eq!(ours.record()?.path, StepPath::Skipped);
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
        let mut grads = empty_store()?;
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

/// f32 has no 1e-46, and the square of 1e-25 is 0 there: the update stays bounded, and without a
/// gradient there is none.
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
