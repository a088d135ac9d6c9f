//! Steps that the GPU decides: what they wait for, what they launch, what is left when something
//! fails.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::backend::device_sync_count;
use candle_grad_clip::optim::{AdamW, Checkpoint, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, NonFinite, StepPath};
use candle_nn::ParamsAdamW;
use support::cuda_on_host::Driver;
use support::gradients::{
    bits_of_vars, named_by_place, random_values, store_for, tensors_of, vars_of,
};

const SHAPES: [&[usize]; 6] = [&[70, 130], &[3], &[], &[0, 4], &[2, 3, 2], &[9000]];
const DTYPES: [DType; 4] = [DType::F32, DType::BF16, DType::F64, DType::F16];

pub(super) fn tensors(seed: u64, device: &Device) -> Result<Vec<Tensor>> {
    let tensors = tensors_of(&SHAPES, seed * 10, &DTYPES)?;
    let moved = tensors.iter().map(|tensor| tensor.to_device(device));
    Ok(moved.collect::<Result<_, _>>()?)
}

pub(super) fn vars(device: &Device) -> Result<Vec<Var>> {
    Ok(vars_of(&tensors(100, device)?)?)
}

/// The gradients of a step; with `bad`, one of them has a NaN.
pub(super) fn grads(vars: &[Var], seed: u64, bad: bool) -> Result<GradStore> {
    let mut tensors = tensors(seed, vars[0].device())?;
    if bad {
        tensors[4] = (&tensors[4] * f64::NAN)?;
    }
    Ok(store_for(vars, &tensors))
}

pub(super) fn adamw(vars: &[Var], clip: Clip) -> Result<ClippedOptimizer<AdamW>> {
    let config = ParamsAdamW {
        lr: 0.125,
        ..ParamsAdamW::default()
    };
    let inner = AdamW::from_named_vars(named_by_place(vars), config)?.master_weights(true);
    Ok(ClippedOptimizer::wrap(inner, named_by_place(vars), clip)?)
}

/// Dampening shows whether a step is taken for a Var's first.
pub(super) fn sgd(vars: &[Var], clip: Clip) -> Result<ClippedOptimizer<Sgd>> {
    let config = ParamsSgd {
        lr: 0.125,
        momentum: 0.75,
        dampening: 0.5,
        weight_decay: 0.25,
        ..ParamsSgd::default()
    };
    let inner = Sgd::from_named_vars(named_by_place(vars), config)?;
    Ok(ClippedOptimizer::wrap(inner, named_by_place(vars), clip)?)
}

/// The bits of the weights, and the file of the optimizer.
pub(super) type State = (Vec<Vec<u64>>, Vec<u8>);

/// Weights, moments and step counter, to the bit.
pub(super) fn everything<O: Checkpoint + 'static>(
    opt: &ClippedOptimizer<O>,
    vars: &[Var],
) -> Result<State> {
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
            let (got, right) = (report.record()?, right.record()?);
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
            .record()?
            .param_norms
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

/// The record has the number of each step, whichever is read first, and whoever decides.
#[test]
fn records_count_tiny_coefficients_in_a_row() -> Result<()> {
    // Step 2 is skipped, step 4 has an ordinary coefficient, from step 6 on the host decides.
    let expected = [1, 1, 2, 0, 1, 2, 3];
    let _driver = Driver::lock(); // others count what it does
    let device = Device::new_cuda(0)?;
    for first in 0..expected.len() {
        let vars = vars(&device)?;
        let mut opt = adamw(&vars, Clip::norm(1e-9))?;
        let mut reports = Vec::new();
        for step in 1..=expected.len() {
            match step {
                4 => opt.set_clip(Clip::norm(1e9))?,
                5 => opt.set_clip(Clip::norm(1e-9))?,
                6 => opt.set_clip(Clip::norm(1e-9).non_finite(NonFinite::Error))?,
                _ => {}
            }
            reports.push(opt.step_report(&grads(&vars, step as u64, step == 2)?)?);
        }
        let mut order: Vec<usize> = (0..expected.len()).collect();
        order.swap(0, first);
        for i in order {
            let record = reports[i].record()?;
            assert_eq!(record.tiny_coefs_in_a_row, expected[i], "{first}, {i}");
        }
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
