//! Clipping on the stand-in device: the same gradients, Vars and reports as on CPU.

use std::slice::from_ref;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::optim::{ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, NonFinite, NormType, optim, total_norm};
use candle_nn::{Optimizer, ParamsAdamW};
use support::cuda_on_host::Driver;
use support::gradients::{store_for, tensors_of, vars_of};
use support::oracle::{self, tolerance};

use crate::assert_close;

const SHAPES: [&[usize]; 5] = [&[40, 30], &[3], &[], &[2, 3, 2], &[2500]];

/// Tensors of all shapes, of dtypes that take turns.
fn tensors(seed: u64, dtypes: &[DType], device: &Device) -> Result<Vec<Tensor>> {
    let tensors = tensors_of(&SHAPES, seed * 10, dtypes)?;
    let moved = tensors.iter().map(|tensor| tensor.to_device(device));
    Ok(moved.collect::<Result<_, _>>()?)
}

/// The Vars after some clipped steps, and the numbers of the reports.
fn train<O: Optimizer + 'static>(
    config: O::Config,
    clip: &Clip,
    dtypes: &[DType],
    device: &Device,
) -> Result<(Vec<Tensor>, Vec<f64>)> {
    let vars = vars_of(&tensors(100, dtypes, device)?)?;
    let inner = O::new(vars.clone(), config)?;
    let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip.clone())?.with_param_norms(true);
    let mut numbers = Vec::new();
    for step in 0..3 {
        let report = opt.step_report(&store_for(&vars, &tensors(step, dtypes, device)?))?;
        numbers.extend([
            report.total_norm()?,
            report.record()?.clipped_norm,
            report.record()?.num_clipped as f64,
        ]);
        numbers.extend(report.record()?.param_norms.iter().map(|(_, norm)| norm));
    }
    Ok((
        vars.iter().map(|var| var.as_tensor().clone()).collect(),
        numbers,
    ))
}

fn is_that_of_the_cpu<O: Optimizer + 'static>(config: O::Config, what: &str) -> Result<()>
where
    O::Config: Clone,
{
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    let clips = [
        ("no clip", Clip::none()),
        ("norm", Clip::norm(1.0)),
        ("L1 norm", Clip::norm(5.0).norm_type(NormType::L1)),
        ("largest", Clip::norm(0.5).norm_type(NormType::Inf)),
        ("value", Clip::value(0.75)),
        ("each Var's norm", Clip::param_norm(1.0)),
    ];
    for (name, clip) in clips {
        for dtypes in [
            &[DType::F32][..],
            &[DType::F64],
            &[DType::F16],
            &[DType::BF16],
            &[DType::F32, DType::BF16, DType::F64, DType::F16],
        ] {
            let what = format!("{what}, {name}, {dtypes:?}");
            let on_gpu = train::<O>(config.clone(), &clip, dtypes, &gpu)?;
            let on_cpu = train::<O>(config.clone(), &clip, dtypes, &Device::Cpu)?;
            for ((got, want), shape) in on_gpu.0.iter().zip(&on_cpu.0).zip(SHAPES) {
                let tolerance = 4.0 * tolerance(want.dtype()).max(1e-6);
                assert_close(got, want, tolerance, &format!("{what}, {shape:?}"))?;
            }
            for (got, want) in on_gpu.1.iter().zip(&on_cpu.1) {
                oracle::assert_close(*got, *want, 1e-5, &what);
            }
        }
    }
    Ok(())
}

#[test]
fn with_adamw_of_candle() -> Result<()> {
    let config = ParamsAdamW {
        lr: 0.125,
        ..ParamsAdamW::default()
    };
    is_that_of_the_cpu::<candle_nn::AdamW>(config, "candle's AdamW")
}

#[test]
fn with_fused_adamw() -> Result<()> {
    let config = ParamsAdamW {
        lr: 0.125,
        ..ParamsAdamW::default()
    };
    is_that_of_the_cpu::<optim::AdamW>(config, "fused AdamW")
}

#[test]
fn with_fused_sgd() -> Result<()> {
    let config = ParamsSgd {
        lr: 0.0625,
        momentum: 0.75,
        ..ParamsSgd::default()
    };
    is_that_of_the_cpu::<Sgd>(config, "fused SGD")
}

#[test]
fn non_finite_gradients_are_counted_and_zeroed() -> Result<()> {
    let _driver = Driver::lock();
    let clip = Clip::norm(1.0).non_finite(NonFinite::Zero);
    let step = |device: &Device| -> Result<(f64, u64, Tensor)> {
        let var = Var::zeros(5, DType::F32, device)?;
        let grad = Tensor::new(
            &[3f32, f32::NAN, f32::INFINITY, 4.0, f32::NEG_INFINITY],
            device,
        )?;
        let inner = candle_nn::SGD::new(vec![var.clone()], 1.0)?;
        let mut opt = ClippedOptimizer::wrap(inner, vec![var.clone()], clip.clone())?;
        let report = opt.step_report(&store_for(from_ref(&var), &[grad]))?;
        Ok((
            report.total_norm()?,
            report.record()?.non_finite,
            var.as_tensor().clone(),
        ))
    };
    let (got, want) = (step(&Device::new_cuda(0)?)?, step(&Device::Cpu)?);
    assert_eq!((got.0, got.1), (want.0, want.1));
    assert_close(&got.2, &want.2, 1e-6, "the Var")
}

/// A failed launch is an error that says so, and leaves the Vars.
#[test]
fn failed_launches_are_errors() -> Result<()> {
    let driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    let var = Var::from_tensor(&Tensor::new(&[1f32, 2.0], &gpu)?)?;
    let grads = store_for(from_ref(&var), &[Tensor::new(&[3f32, 4.0], &gpu)?]);
    driver.fail_allocations_after(0);
    assert!(total_norm(&grads, from_ref(&var), NormType::L2).is_err());
    driver.stop_failing();
    assert_eq!(total_norm(&grads, &[var], NormType::L2)?, 5.0);
    Ok(())
}
