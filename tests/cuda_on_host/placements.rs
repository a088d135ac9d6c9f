//! Where gradients and Vars lie: on two devices, anywhere in memory, in units, read by another
//! thread.

use anyhow::{Result, bail};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::{Optimizer, ParamsAdamW};
use support::cuda_on_host::Driver;
use support::gradients::{FLOATS, bits_of_vars, named_by_place, random_values, store_for};

use super::steps::{adamw, grads, sgd, tensors, vars};

/// Vars on CPU and on the GPU in one store: one norm over all of them.
#[test]
fn vars_on_two_devices_are_clipped_together() -> Result<()> {
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    let train = |devices: [&Device; 2], fused: bool| -> Result<_> {
        let mut all = Vec::new();
        // candle's SGD can't step Vars without elements.
        let has_step = |tensor: &Tensor| fused || tensor.elem_count() > 0;
        for (i, tensor) in tensors(100, &Device::Cpu)?.iter().enumerate() {
            if !has_step(tensor) {
                continue;
            }
            all.push(Var::from_tensor(&tensor.to_device(devices[i % 2])?)?);
        }
        let gradients = |seed| -> Result<GradStore> {
            let on_cpu = tensors(seed, &Device::Cpu)?;
            let moved = on_cpu.iter().filter(|grad| has_step(grad)).zip(&all);
            let moved = moved.map(|(tensor, var)| tensor.to_device(var.device()));
            Ok(store_for(&all, &moved.collect::<Result<Vec<_>, _>>()?))
        };
        let mut norms = Vec::new();
        if fused {
            let mut opt = adamw(&all, Clip::norm(1.0))?;
            for step in 0..3 {
                norms.push(opt.step_report(&gradients(step)?)?.total_norm()?);
            }
        } else {
            let inner = candle_nn::SGD::new(all.clone(), 0.125)?;
            let mut opt = ClippedOptimizer::wrap(inner, named_by_place(&all), Clip::norm(1.0))?;
            for step in 0..3 {
                norms.push(opt.step_report(&gradients(step)?)?.total_norm()?);
            }
        }
        let on_cpu = all.iter().map(|var| var.to_device(&Device::Cpu));
        Ok((on_cpu.collect::<Result<Vec<_>, _>>()?, norms))
    };
    for fused in [true, false] {
        let (right, right_norms) = train([&Device::Cpu; 2], fused)?;
        for devices in [[&gpu, &Device::Cpu], [&Device::Cpu, &gpu], [&gpu, &gpu]] {
            let (got, norms) = train(devices, fused)?;
            for (i, (got, right)) in got.iter().zip(&right).enumerate() {
                crate::assert_close(got, right, 1e-5, &format!("fused {fused}, Var {i}"))?;
            }
            for (norm, right) in norms.iter().zip(&right_norms) {
                assert!((norm / right - 1.0).abs() < 1e-12, "{norm} for {right}");
            }
        }
    }
    Ok(())
}

/// Gradients that begin anywhere, or are not one after the other: the bits are those of aligned
/// copies.
#[test]
fn unaligned_and_strided_gradients_are_read_as_they_are() -> Result<()> {
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    for dtype in FLOATS {
        for offset in 0..5 {
            let values = random_values(5_000 + offset, offset as u64);
            let whole = Tensor::from_vec(values, 5_000 + offset, &Device::Cpu)?.to_dtype(dtype)?;
            let whole = whole.to_device(&gpu)?;
            let unaligned = whole.narrow(0, offset, 5_000)?.reshape((50, 100))?;
            let strided = unaligned.t()?.contiguous()?.t()?;
            let train = |grad: &Tensor| -> Result<_> {
                let vars = [Var::zeros((50, 100), dtype, &gpu)?];
                let mut opt = sgd(&vars, Clip::norm(1.0))?;
                let report = opt.step_report(&store_for(&vars, std::slice::from_ref(grad)))?;
                Ok((bits_of_vars(&vars)?, report.total_norm()?))
            };
            let right = train(&unaligned.copy()?)?;
            assert!(train(&unaligned)? == right, "{dtype:?}, from {offset}");
            assert!(train(&strided)? == right, "{dtype:?}, strided");
        }
    }
    Ok(())
}

#[test]
fn a_report_can_be_read_on_another_thread() -> Result<()> {
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    let vars = vars(&gpu)?;
    let mut opt = adamw(&vars, Clip::norm(1.0))?.with_param_norms(true);
    for step in 0..3 {
        let store = grads(&vars, step, false)?;
        let total = candle_grad_clip::total_norm(&store, &vars, candle_grad_clip::NormType::L2)?;
        let report = opt.step_report(&store)?;
        let read = move || report.record().cloned();
        let record = match std::thread::spawn(read).join() {
            Ok(record) => record?,
            Err(_) => bail!("the thread panicked"),
        };
        let squares: f64 = record.param_norms.iter().map(|(_, norm)| norm * norm).sum();
        assert!((squares.sqrt() / total - 1.0).abs() < 1e-12, "step {step}");
        assert_eq!(record.total_norm, total, "step {step}");
    }
    Ok(())
}

/// A wrapper of some of an optimizer's Vars, with a coefficient for each unit.
#[test]
fn units_are_clipped_for_some_of_the_vars() -> Result<()> {
    let _driver = Driver::lock();
    let train = |device: &Device| -> Result<_> {
        let all = vars(device)?;
        let config = ParamsAdamW::default();
        let some: Vec<(String, Var)> = named_by_place(&all).into_iter().take(2).collect();
        let mut opt = ClippedOptimizer::wrap_allow_unclipped(
            AdamW::from_named_vars(named_by_place(&all), config)?,
            some,
            Clip::agc(),
            &["*"],
        )?;
        for step in 0..2 {
            opt.step_report(&grads(&all, step, false)?)?;
        }
        let on_cpu = all.iter().map(|var| var.to_device(&Device::Cpu));
        Ok(on_cpu.collect::<Result<Vec<_>, _>>()?)
    };
    let right = train(&Device::Cpu)?;
    for (i, (got, right)) in train(&Device::new_cuda(0)?)?.iter().zip(&right).enumerate() {
        crate::assert_close(got, right, 1e-5, &format!("Var {i}"))?;
    }
    Ok(())
}
