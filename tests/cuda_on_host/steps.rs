//! Steps that the GPU decides: what they wait for, what they launch, what is left when something fails.

use anyhow::{Result, bail};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::backend::device_sync_count;
use candle_grad_clip::optim::{AdamW, Checkpoint, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NonFinite, StepPath};
use candle_nn::{Optimizer, ParamsAdamW};
use support::cuda_on_host::Driver;
use support::gradients::{bits_of_vars, host_tensor, random_values, store_for};

const SHAPES: [&[usize]; 6] = [&[70, 130], &[3], &[], &[0, 4], &[2, 3, 2], &[9000]];
const DTYPES: [DType; 4] = [DType::F32, DType::BF16, DType::F64, DType::F16];

fn tensors(seed: u64, device: &Device) -> Result<Vec<Tensor>> {
    let make = |(i, shape): (usize, &&[usize])| {
        let values = random_values(shape.iter().product(), seed * 10 + i as u64);
        Ok(host_tensor(&values, *shape, DTYPES[i % 4])?.to_device(device)?)
    };
    SHAPES.iter().enumerate().map(make).collect()
}

fn vars(device: &Device) -> Result<Vec<Var>> {
    let vars = tensors(100, device)?;
    Ok(vars
        .iter()
        .map(Var::from_tensor)
        .collect::<Result<_, _>>()?)
}

/// The gradients of a step; with `bad`, one of them has a NaN.
fn grads(vars: &[Var], seed: u64, bad: bool) -> Result<GradStore> {
    let mut tensors = tensors(seed, vars[0].device())?;
    if bad {
        tensors[4] = (&tensors[4] * f64::NAN)?;
    }
    Ok(store_for(vars, &tensors))
}

fn named(vars: &[Var]) -> Vec<(String, Var)> {
    let name = |(i, var): (usize, &Var)| (format!("layer.{i}"), var.clone());
    vars.iter().enumerate().map(name).collect()
}

fn adamw(vars: &[Var], clip: Clip) -> Result<ClippedOptimizer<AdamW>> {
    let config = ParamsAdamW {
        lr: 0.125,
        ..ParamsAdamW::default()
    };
    let inner = AdamW::named(named(vars), config)?.master_weights(true);
    Ok(ClippedOptimizer::wrap(inner, named(vars), clip)?)
}

/// Dampening shows whether a step is taken for a Var's first.
fn sgd(vars: &[Var], clip: Clip) -> Result<ClippedOptimizer<Sgd>> {
    let config = ParamsSgd {
        lr: 0.125,
        momentum: 0.75,
        dampening: 0.5,
        weight_decay: 0.25,
        ..ParamsSgd::default()
    };
    let inner = Sgd::named(named(vars), config)?;
    Ok(ClippedOptimizer::wrap(inner, named(vars), clip)?)
}

/// Weights, moments and step counter, to the bit.
fn everything<O: Checkpoint + 'static>(
    opt: &ClippedOptimizer<O>,
    vars: &[Var],
) -> Result<(Vec<Vec<u64>>, Vec<u8>)> {
    let thread = format!("{:?}", std::thread::current().id());
    let file = format!("candle-grad-clip-steps-{}-{thread}", std::process::id());
    let path = std::env::temp_dir().join(file);
    opt.save_non_finite(&path)?; // under `Propagate` it may be that
    let saved = std::fs::read(&path)?;
    std::fs::remove_file(path)?;
    Ok((bits_of_vars(vars)?, saved))
}

fn clips() -> Vec<Clip> {
    let policies = [NonFinite::SkipStep, NonFinite::Zero, NonFinite::Propagate];
    let clips = [Clip::norm(1.0), Clip::value(0.75), Clip::none()];
    let with = |clip: &Clip| policies.map(|policy| clip.clone().non_finite(policy));
    clips.iter().flat_map(with).collect()
}

fn waits_for_nothing<O: Checkpoint + 'static>(
    make: impl Fn(&[Var], Clip) -> Result<ClippedOptimizer<O>>,
) -> Result<()> {
    let driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    for clip in clips() {
        let (vars, on_cpu) = (vars(&gpu)?, vars(&Device::Cpu)?);
        let mut opt = make(&vars, clip.clone())?;
        let mut plain = make(&on_cpu, clip.clone())?;
        let stores: Vec<GradStore> = (0..5)
            .map(|step| grads(&vars, step, step == 2))
            .collect::<Result<_>>()?;
        opt.step_report(&stores[0])?; // loads the kernels
        plain.step_report(&grads(&on_cpu, 0, false)?)?;
        driver.reset_counts();
        let before = device_sync_count();
        let mut reports = Vec::new();
        for store in &stores[1..] {
            reports.push(opt.step_report(store)?);
        }
        assert_eq!(driver.count(c"synchronizations"), 0, "{clip}");
        assert_eq!(device_sync_count(), before, "{clip}");
        assert_eq!(driver.count(c"launches"), 3 * 4, "{clip}");
        assert_eq!(
            driver.count(c"dtoh_copies"),
            4,
            "{clip}: the results, into pinned memory"
        );
        // Each report has the numbers of its own step.
        for (step, report) in (1..5).zip(reports) {
            let right = plain.step_report(&grads(&on_cpu, step, step == 2)?)?;
            assert_eq!(report.path(), StepPath::Fused);
            let (got, right) = (report.to_record()?, right.to_record()?);
            assert_eq!(got.step, right.step);
            assert_eq!(
                (got.skipped, got.path),
                (right.skipped, right.path),
                "{clip}"
            );
            assert_eq!(got.non_finite, right.non_finite, "{clip}");
            assert_eq!(got.num_clipped, right.num_clipped, "{clip}");
            for (got, right) in [
                (got.total_norm, right.total_norm),
                (got.clipped_norm, right.clipped_norm),
                (got.clip_coef, right.clip_coef),
            ] {
                let same = (got.is_nan() && right.is_nan()) || (got - right).abs() <= 1e-12 * right;
                assert!(same, "{clip}, step {step}: {got:e}, on CPU {right:e}");
            }
        }
        assert_eq!(opt.inner().learning_rate(), plain.inner().learning_rate());
    }
    Ok(())
}

#[test]
fn adamw_waits_for_nothing() -> Result<()> {
    waits_for_nothing(adamw)
}

#[test]
fn sgd_waits_for_nothing() -> Result<()> {
    waits_for_nothing(sgd)
}

fn a_skipped_step_never_was<O: Checkpoint + 'static>(
    make: impl Fn(&[Var], Clip) -> Result<ClippedOptimizer<O>>,
) -> Result<()> {
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    // Skips at the start, in the middle and at the end.
    let train = |skips: &[u64]| -> Result<_> {
        let vars = vars(&gpu)?;
        let mut opt = make(&vars, Clip::norm(1.0))?;
        for step in 0..4 {
            for _ in skips.iter().filter(|at| **at == step) {
                assert!(opt.step_report(&grads(&vars, 50, true)?)?.skipped()?);
            }
            assert!(!opt.step_report(&grads(&vars, step, false)?)?.skipped()?);
        }
        for _ in skips.iter().filter(|at| **at == 4) {
            opt.step_report(&grads(&vars, 50, true)?)?;
        }
        let inner = opt.into_inner();
        let opt = ClippedOptimizer::wrap(inner, named(&vars), Clip::norm(1.0))?;
        everything(&opt, &vars)
    };
    let right = train(&[])?;
    for skips in [&[0][..], &[0, 0, 2], &[4], &[1, 3, 4, 4]] {
        assert!(train(skips)? == right, "{skips:?}");
    }
    Ok(())
}

#[test]
fn a_skipped_step_of_adamw_never_was() -> Result<()> {
    a_skipped_step_never_was(adamw)
}

#[test]
fn a_skipped_step_of_sgd_never_was() -> Result<()> {
    a_skipped_step_never_was(sgd)
}

#[test]
fn one_skip_too_many_is_an_error_some_steps_late() -> Result<()> {
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    let vars = vars(&gpu)?;
    let mut opt = adamw(&vars, Clip::norm(1.0).max_skips(2))?;
    opt.step_report(&grads(&vars, 0, false)?)?;
    let before = bits_of_vars(&vars)?;
    for _ in 0..3 {
        opt.step_report(&grads(&vars, 1, true)?)?;
    }
    gpu.synchronize()?; // that the results arrive, as they do in time
    let error = match opt.step_report(&grads(&vars, 2, false)?) {
        Err(error) => error,
        Ok(report) => bail!("{report:?}"),
    };
    match &error {
        Error::TooManySkips {
            skips: 3,
            max_skips: 2,
            var,
        } => assert_eq!(var, "layer.4"),
        other => bail!("{other}"),
    }
    assert_eq!(bits_of_vars(&vars)?, before);
    // It has been said; training can go on.
    assert!(!opt.step_report(&grads(&vars, 2, false)?)?.skipped()?);
    Ok(())
}

fn a_failure_loses_nothing<O: Checkpoint + 'static>(
    make: impl Fn(&[Var], Clip) -> Result<ClippedOptimizer<O>>,
    kernels: &[&std::ffi::CStr],
) -> Result<()> {
    let driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    // The first step fails, or one in the middle.
    for taken in [0, 2] {
        let start = || -> Result<_> {
            let vars = vars(&gpu)?;
            let mut opt = make(&vars, Clip::norm(1.0))?;
            for step in 0..taken {
                opt.step_report(&grads(&vars, step, false)?)?;
            }
            Ok((vars, opt))
        };
        let (vars, mut opt) = start()?;
        opt.step_report(&grads(&vars, taken, false)?)?;
        opt.step_report(&grads(&vars, taken + 1, false)?)?;
        let right = everything(&opt, &vars)?;

        let mut failures = 0;
        for n in 0..40 {
            let (vars, mut opt) = start()?;
            let store = grads(&vars, taken, false)?;
            let before = everything(&opt, &vars)?;
            driver.fail_allocations_after(n);
            let failed = opt.step_report(&store);
            driver.stop_failing();
            match failed {
                Ok(_) => break,
                Err(error) => {
                    assert!(error.to_string().contains("OUT_OF_MEMORY"), "{error}");
                    failures += 1;
                    assert!(everything(&opt, &vars)? == before, "allocation {n}");
                    opt.step_report(&store)?;
                }
            }
            opt.step_report(&grads(&vars, taken + 1, false)?)?;
            assert!(
                everything(&opt, &vars)? == right,
                "allocation {n}, afterwards"
            );
        }
        assert!(failures >= 4, "{failures}");

        for kernel in kernels {
            let (vars, mut opt) = start()?;
            let store = grads(&vars, taken, false)?;
            let before = everything(&opt, &vars)?;
            driver.fail_launches(kernel);
            let failed = opt.step_report(&store);
            driver.stop_failing();
            let Err(error) = failed else {
                bail!("{kernel:?} did not fail");
            };
            assert!(
                error.to_string().contains(&*kernel.to_string_lossy()),
                "{error}"
            );
            assert!(everything(&opt, &vars)? == before, "{kernel:?}");
            opt.step_report(&store)?;
            opt.step_report(&grads(&vars, taken + 1, false)?)?;
            assert!(
                everything(&opt, &vars)?.0 == right.0,
                "{kernel:?}, afterwards"
            );
        }
    }
    Ok(())
}

#[test]
fn a_failed_step_of_adamw_loses_nothing() -> Result<()> {
    a_failure_loses_nothing(adamw, &[c"clip_measure_l2", c"clip_fold", c"clip_adamw"])
}

#[test]
fn a_failed_step_of_sgd_loses_nothing() -> Result<()> {
    a_failure_loses_nothing(sgd, &[c"clip_measure_l2", c"clip_fold", c"clip_sgd"])
}

/// Host and GPU take turns in leading: counters, moments and first steps go from one to the other.
fn the_lead_changes<O: Checkpoint + 'static>(
    make: impl Fn(&[Var], Clip) -> Result<ClippedOptimizer<O>>,
) -> Result<()> {
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    let train = |lead: &dyn Fn(u64) -> bool| -> Result<_> {
        let vars = vars(&gpu)?;
        let mut opt = make(&vars, Clip::norm(1.0))?;
        for step in 0..6 {
            // A policy that needs an answer at once leaves the decision to the host.
            let policy = if lead(step) {
                NonFinite::SkipStep
            } else {
                NonFinite::Error
            };
            opt.set_clip(Clip::norm(1.0).non_finite(policy))?;
            let mut store = grads(&vars, step, false)?;
            if step < 3 {
                store.remove(&vars[5]); // whose first step is a later one
            }
            opt.step_report(&store)?;
        }
        opt.set_clip(Clip::norm(1.0))?;
        everything(&opt, &vars)
    };
    let right = train(&|_| false)?;
    assert!(train(&|_| true)? == right);
    assert!(train(&|step| step % 2 == 0)? == right);
    assert!(train(&|step| step >= 3)? == right);
    assert!(train(&|step| step < 3)? == right);
    Ok(())
}

#[test]
fn the_lead_of_adamw_changes_without_a_trace() -> Result<()> {
    the_lead_changes(adamw)
}

#[test]
fn the_lead_of_sgd_changes_without_a_trace() -> Result<()> {
    the_lead_changes(sgd)
}

#[test]
fn a_hundred_runs_have_the_same_bits() -> Result<()> {
    let driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    let train = || -> Result<_> {
        let vars = vars(&gpu)?;
        let mut opt = adamw(&vars, Clip::norm(1.0))?.with_param_norms(true);
        let report = opt.step_report(&grads(&vars, 0, false)?)?;
        let norms: Vec<u64> = report
            .param_norms()?
            .iter()
            .map(|(_, norm)| norm.to_bits())
            .collect();
        Ok((
            everything(&opt, &vars)?,
            norms,
            report.total_norm()?.to_bits(),
        ))
    };
    let right = train()?;
    for seed in 1..100 {
        driver.seed(seed); // another order of blocks and threads
        assert!(train()? == right, "run {seed}");
    }
    Ok(())
}

#[test]
fn ten_thousand_tensors_take_three_launches() -> Result<()> {
    let driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    let (mut vars, mut on_cpu) = (Vec::new(), Vec::new());
    for i in 0..10_000 {
        let values = random_values(i % 7, i as u64);
        let tensor = Tensor::from_vec(values, i % 7, &Device::Cpu)?.to_dtype(DType::F32)?;
        vars.push(Var::from_tensor(&tensor.to_device(&gpu)?)?);
        on_cpu.push(Var::from_tensor(&tensor)?);
    }
    let copies = |vars: &[Var]| -> Result<Vec<Tensor>> {
        Ok(vars
            .iter()
            .map(|var| var.copy())
            .collect::<Result<_, _>>()?)
    };
    let store = store_for(&vars, &copies(&vars)?);
    let store_on_cpu = store_for(&on_cpu, &copies(&on_cpu)?);
    let mut opt = adamw(&vars, Clip::norm(1.0))?;
    let mut plain = adamw(&on_cpu, Clip::norm(1.0))?;
    opt.step_report(&store)?;
    plain.step_report(&store_on_cpu)?;
    driver.reset_counts();
    let report = opt.step_report(&store)?;
    assert_eq!(driver.count(c"launches"), 3);
    let right = plain.step_report(&store_on_cpu)?;
    let (got, right) = (report.total_norm()?, right.total_norm()?);
    assert!((got / right - 1.0).abs() < 1e-12, "{got} for {right}");
    let on_host: Vec<Tensor> = vars
        .iter()
        .map(|var| var.to_device(&Device::Cpu))
        .collect::<Result<_, _>>()?;
    for (i, (got, right)) in on_host.iter().zip(&on_cpu).enumerate() {
        crate::assert_close(got, right, 1e-6, &format!("Var {i}"))?;
    }
    Ok(())
}

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
            let mut opt = ClippedOptimizer::wrap(inner, named(&all), Clip::norm(1.0))?;
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

/// Gradients that begin anywhere, or are not one after the other: the bits are those of aligned copies.
#[test]
fn unaligned_and_strided_gradients_are_read_as_they_are() -> Result<()> {
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    for dtype in DTYPES {
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
        let read = move || report.to_record();
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

/// Weights that are set after a skipped first step are those that train, also where they have copies in full precision.
#[test]
fn weights_set_after_a_skipped_first_step_are_taken() -> Result<()> {
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    let train = |skips: bool| -> Result<_> {
        let vars = vars(&gpu)?;
        let mut opt = adamw(&vars, Clip::norm(1.0))?;
        if skips {
            opt.step_report(&grads(&vars, 50, true)?)?;
        }
        for (var, other) in vars.iter().zip(tensors(7, &gpu)?) {
            if var.elem_count() > 0 {
                var.set(&other)?;
            }
        }
        opt.step_report(&grads(&vars, 1, false)?)?;
        Ok(bits_of_vars(&vars)?)
    };
    assert!(train(true)? == train(false)?);
    Ok(())
}

/// A wrapper of some of an optimizer's Vars, with a coefficient for each unit.
#[test]
fn units_are_clipped_for_some_of_the_vars() -> Result<()> {
    let _driver = Driver::lock();
    let train = |device: &Device| -> Result<_> {
        let all = vars(device)?;
        let config = ParamsAdamW::default();
        let some: Vec<(String, Var)> = named(&all).into_iter().take(2).collect();
        let mut opt = ClippedOptimizer::wrap_allow_unclipped(
            AdamW::named(named(&all), config)?,
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

/// Taken, skipped and failing steps: each calls the function of the limit once, and counts as taken or not.
#[test]
fn the_function_of_the_limit_is_called_once_a_step() -> Result<()> {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    let _driver = Driver::lock();
    let vars = vars(&Device::new_cuda(0)?)?;
    for strict in [false, true] {
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = calls.clone();
        let clip = |max_norm: f64| {
            let policy = if strict {
                NonFinite::Error
            } else {
                NonFinite::SkipStep
            };
            Clip::norm(max_norm).non_finite(policy)
        };
        let mut opt = adamw(&vars, clip(1.0))?.with_max_norm_schedule(move |_| {
            1.0 / (counter.fetch_add(1, Ordering::Relaxed) + 1) as f64
        })?;
        for (step, bad) in [false, true, false].into_iter().enumerate() {
            let result = opt.step_report(&grads(&vars, step as u64, bad)?);
            assert_eq!(result.is_err(), strict && bad);
            assert_eq!(calls.load(Ordering::Relaxed), step + 1);
            assert_eq!(opt.clip(), &clip(1.0 / (step + 1) as f64));
        }
        assert_eq!(opt.steps_taken()?, 2);
    }
    Ok(())
}
