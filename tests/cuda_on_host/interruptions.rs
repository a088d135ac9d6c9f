//! Steps that are skipped or fail: nothing is lost, and nothing is done twice.

use anyhow::{Result, bail};
use candle_core::{Device, Var};
use candle_grad_clip::optim::Checkpoint;
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NonFinite};
use support::cuda_on_host::Driver;
use support::gradients::{bits_of_vars, named_by_place};

use super::steps::{State, adamw, everything, grads, sgd, tensors, vars};

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
        let opt = ClippedOptimizer::wrap(inner, named_by_place(&vars), Clip::norm(1.0))?;
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
            var: Some(var),
            ..
        } => assert_eq!(var, "layer.4"),
        other => bail!("{other}"),
    }
    assert_eq!(bits_of_vars(&vars)?, before);
    // It has been said; training can go on.
    assert!(!opt.step_report(&grads(&vars, 2, false)?)?.skipped()?);
    Ok(())
}

/// Vars and an optimizer that has taken so many steps.
fn after<O: Checkpoint + 'static>(
    make: impl Fn(&[Var], Clip) -> Result<ClippedOptimizer<O>>,
    taken: u64,
) -> Result<(Vec<Var>, ClippedOptimizer<O>)> {
    let vars = vars(&Device::new_cuda(0)?)?;
    let mut opt = make(&vars, Clip::norm(1.0))?;
    for step in 0..taken {
        opt.step_report(&grads(&vars, step, false)?)?;
    }
    Ok((vars, opt))
}

fn a_failure_loses_nothing<O: Checkpoint + 'static>(
    make: impl Fn(&[Var], Clip) -> Result<ClippedOptimizer<O>>,
    kernels: &[&std::ffi::CStr],
) -> Result<()> {
    let driver = Driver::lock();
    // The first step fails, or one in the middle.
    for taken in [0, 2] {
        let (vars, mut opt) = after(&make, taken)?;
        opt.step_report(&grads(&vars, taken, false)?)?;
        opt.step_report(&grads(&vars, taken + 1, false)?)?;
        let right = everything(&opt, &vars)?;

        let mut failures = 0;
        for n in 0..40 {
            let what = format!("allocation {n}");
            let fail = || driver.fail_allocations_after(n);
            match a_failed_step(&driver, after(&make, taken)?, taken, &what, fail)? {
                None => break,
                Some((error, end)) => {
                    assert!(error.contains("OUT_OF_MEMORY"), "{error}");
                    failures += 1;
                    assert!(end == right, "{what}, afterwards");
                }
            }
        }
        assert!(failures >= 4, "{failures}");

        for kernel in kernels {
            let what = format!("{kernel:?}");
            let fail = || driver.fail_launches(kernel);
            let failed = a_failed_step(&driver, after(&make, taken)?, taken, &what, fail)?;
            let Some((error, end)) = failed else {
                bail!("{what} did not fail");
            };
            assert!(error.contains(&*kernel.to_string_lossy()), "{error}");
            assert!(end.0 == right.0, "{what}, afterwards");
        }
    }
    Ok(())
}

/// A step that fails, if it does, leaves everything as it was. Then that step again, and the next:
/// the error, and where they end.
fn a_failed_step<O: Checkpoint + 'static>(
    driver: &Driver,
    (vars, mut opt): (Vec<Var>, ClippedOptimizer<O>),
    step: u64,
    what: &str,
    fail: impl FnOnce(),
) -> Result<Option<(String, State)>> {
    let store = grads(&vars, step, false)?;
    let before = everything(&opt, &vars)?;
    fail();
    let failed = opt.step_report(&store);
    driver.stop_failing();
    let Err(error) = failed else {
        return Ok(None);
    };
    assert!(everything(&opt, &vars)? == before, "{what}");
    opt.step_report(&store)?;
    opt.step_report(&grads(&vars, step + 1, false)?)?;
    Ok(Some((error.to_string(), everything(&opt, &vars)?)))
}

#[test]
fn a_failed_step_of_adamw_loses_nothing() -> Result<()> {
    a_failure_loses_nothing(adamw, &[c"clip_measure_l2", c"clip_fold", c"clip_adamw"])
}

#[test]
fn a_failed_step_of_sgd_loses_nothing() -> Result<()> {
    a_failure_loses_nothing(sgd, &[c"clip_measure_l2", c"clip_fold", c"clip_sgd"])
}

/// Weights that are set after a skipped first step are those that train, also where they have
/// copies in full precision.
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

/// Taken, skipped and failing steps: each calls the function of the limit once, and counts as taken
/// or not.
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
