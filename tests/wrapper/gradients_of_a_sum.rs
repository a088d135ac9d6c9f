//! The two gradients of a sum are equal, and may share one storage: each is scaled once.
//!
//! Gradients (3, 4) and (3, 4) have the norm 7.071; with a limit of 1 each becomes (0.424, 0.566).
//! candle 0.11 gives them separate storage, so most tests make the store by hand.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{
    Clip, ClippedOptimizer, GradAccumulator, NormType, StepReport, clip_by_global_norm,
    clip_grad_norm, clip_grad_value, clip_grads_with_norm, total_norm,
};
use candle_nn::{Optimizer, ParamsAdamW, SGD};
use support::device::on_every_backend;
use support::gradients::{
    FLOATS, all_values, all_values_of_vars, bits_of_vars, gradients_of, store_for, tensor, values,
};
use support::oracle::{assert_all_close, assert_close, tolerance};

const NORM: f64 = 5.0 * std::f64::consts::SQRT_2;
/// The gradients after clipping to 1, and the negated Vars after a step of 1.
const CLIPPED: [f64; 4] = [3.0 / NORM, 4.0 / NORM, 3.0 / NORM, 4.0 / NORM];

/// Two Vars of zeros, and (3, 4) as the gradient of both: one storage.
fn of_a_sum(dtype: DType) -> Result<(Vec<Var>, GradStore, Tensor)> {
    let grad = tensor(&[3.0, 4.0], 2, dtype)?;
    let var = || Var::zeros(2, dtype, grad.device());
    let vars = vec![var()?, var()?];
    let store = store_for(&vars, &[grad.clone(), grad.clone()]);
    Ok((vars, store, grad))
}

/// The loss of which they are the gradients.
fn loss(vars: &[Var]) -> Result<Tensor> {
    let sum = (vars[0].as_tensor() + vars[1].as_tensor())?;
    let factors = tensor(&[3.0, 4.0], 2, vars[0].dtype())?;
    Ok((sum * factors)?.sum_all()?)
}

/// The relative error of a clipped element: that of the dtype, and the eps of 1e-6.
fn allowed(dtype: DType) -> f64 {
    tolerance(dtype).max(1e-6)
}

type ClipToOne = fn(&mut GradStore, &[Var]) -> Result<()>;

#[test]
fn the_functions_scale_each_once() -> Result<()> {
    let clip: [ClipToOne; 3] = [
        |grads, vars| {
            let norm = clip_grad_norm(grads, vars, 1.0)?;
            assert_close(norm, NORM, 1e-12, "the norm of both");
            Ok(())
        },
        |grads, vars| Ok(clip_grads_with_norm(grads, vars, 1.0, NORM)?),
        |grads, vars| {
            let (clipped, norm) = clip_by_global_norm(grads, vars, 1.0, None)?;
            assert_close(norm, NORM, 1e-12, "the norm of both");
            *grads = clipped;
            Ok(())
        },
    ];
    on_every_backend(|| {
        for dtype in FLOATS {
            for clip in clip {
                let (vars, mut grads, _) = of_a_sum(dtype)?;
                let norm = total_norm(&grads, &vars, NormType::L2)?;
                assert_close(norm, NORM, 1e-12, "the norm of both");
                clip(&mut grads, &vars)?;
                let clipped = all_values(&gradients_of(&grads, &vars)?)?;
                assert_all_close(&clipped, &CLIPPED, allowed(dtype), "clipped");
            }
            let (vars, mut grads, _) = of_a_sum(dtype)?;
            clip_grad_value(&mut grads, &vars, 3.5)?;
            let clamped = all_values(&gradients_of(&grads, &vars)?)?;
            assert_eq!(clamped, [3.0, 3.5, 3.0, 3.5]);
        }
        Ok(())
    })
}

/// Takes a step with a rate of 1 on a shared storage, and one by `backward`, and checks both.
fn check_steps<O: Optimizer + 'static>(
    dtype: DType,
    make: fn(Vec<Var>) -> candle_core::Result<O>,
) -> Result<()> {
    let check = |report: &StepReport, vars: &[Var]| -> Result<()> {
        assert_close(report.total_norm()?, NORM, 1e-12, "the norm of both");
        assert_close(report.clip_coef()?, 1.0 / NORM, 1e-6, "the coefficient");
        let moved: Vec<f64> = all_values_of_vars(vars)?.iter().map(|x| -x).collect();
        assert_all_close(&moved, &CLIPPED, allowed(dtype), "one step");
        Ok(())
    };
    let wrap = |vars: &[Var]| -> Result<_> {
        let inner = make(vars.to_vec())?;
        Ok(ClippedOptimizer::wrap(
            inner,
            vars.to_vec(),
            Clip::norm(1.0),
        )?)
    };
    let (vars, grads, grad) = of_a_sum(dtype)?;
    let report = wrap(&vars)?.step_report(&grads)?;
    check(&report, &vars)?;
    assert_eq!(values(&grad)?, [3.0, 4.0], "lent gradients stay");
    let (vars, ..) = of_a_sum(dtype)?;
    let report = wrap(&vars)?.backward_step_report(&loss(&vars)?)?;
    check(&report, &vars)
}

#[test]
fn the_wrapper_scales_each_once() -> Result<()> {
    on_every_backend(|| {
        for dtype in FLOATS {
            check_steps(dtype, |vars| SGD::new(vars, 1.0))?;
            check_steps(dtype, |vars| Sgd::new(vars, 1.0.into()))?;
        }
        Ok(())
    })
}

/// Moments and weights are those of separate storages, to the bit.
#[test]
fn fused_steps_have_the_bits_of_separate_storages() -> Result<()> {
    on_every_backend(|| {
        for dtype in FLOATS {
            let run = |is_shared: bool| -> Result<_> {
                let (vars, shared, grad) = of_a_sum(dtype)?;
                let separate = store_for(&vars, &[grad.copy()?, grad.copy()?]);
                let grads = if is_shared { shared } else { separate };
                let adamw = AdamW::new(vars.clone(), ParamsAdamW::default())?;
                let mut adamw = ClippedOptimizer::wrap(adamw, vars.clone(), Clip::norm(1.0))?;
                let mut sgd = Sgd::new(vars.clone(), 0.1.into())?; // without a wrapper
                for _ in 0..3 {
                    adamw.step(&grads)?;
                    sgd.step(&grads)?;
                }
                Ok(bits_of_vars(&vars)?)
            };
            assert_eq!(run(true)?, run(false)?, "{dtype:?}");
        }
        Ok(())
    })
}

#[test]
fn the_accumulator_adds_each_once() -> Result<()> {
    on_every_backend(|| {
        for dtype in FLOATS {
            let (vars, grads, grad) = of_a_sum(dtype)?;
            let mut mean = GradAccumulator::mean(vars.clone());
            for _ in 0..2 {
                mean.add(&grads)?;
            }
            let taken = mean.take_grads()?.expect("two micro-batches");
            let gradients = all_values(&gradients_of(taken, &vars)?)?;
            assert_eq!(gradients, [3.0, 4.0, 3.0, 4.0]);
            clip_grad_norm(taken, &vars, 1.0)?;
            let clipped = all_values(&gradients_of(taken, &vars)?)?;
            assert_all_close(&clipped, &CLIPPED, allowed(dtype), "clipped");
            assert_eq!(values(&grad)?, [3.0, 4.0], "the micro-batch's stay");
        }
        Ok(())
    })
}
