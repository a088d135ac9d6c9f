//! Training beside other threads that use the same Vars and gradients: no order of locks and pools
//! hangs.
//!
//! Each test runs in its own process, which a watchdog ends, with rayon pools of 1, 2 and 8
//! threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{
    Clip, ClippedOptimizer, GradAccumulator, NormType, clip_grad_norm, total_norm,
};
use candle_nn::{Optimizer, ParamsAdamW};
use rayon::prelude::*;
use support::gradients::empty_store;
use support::watchdog::Watchdog;

const EVALUATIONS: usize = 200;

/// Runs `body` in processes with pools of 1, 2 and 8 threads.
fn with_pools(test: &str, body: fn() -> Result<()>) {
    for threads in [1, 2, 8] {
        Watchdog::new(&format!("threads::{test}"), Duration::from_secs(60))
            .rayon_threads(threads)
            .run(body);
    }
}

fn square(n: usize) -> Result<Var> {
    Ok(Var::from_tensor(
        &(Tensor::ones((n, n), DType::F32, &Device::Cpu)? * 0.01)?,
    )?)
}

fn squares(count: usize, n: usize) -> Result<Vec<Var>> {
    (0..count).map(|_| square(n)).collect()
}

/// As `w.sqr().sum()` leaves them.
fn gradients(vars: &[Var]) -> Result<GradStore> {
    let mut grads = empty_store()?;
    for var in vars {
        grads.insert(var, (var.as_tensor() * 2.0)?.detach());
    }
    Ok(grads)
}

fn adamw(vars: &[Var]) -> Result<ClippedOptimizer<AdamW>> {
    let adamw = AdamW::new(vars.to_vec(), ParamsAdamW::default())?;
    Ok(ClippedOptimizer::wrap(
        adamw,
        vars.to_vec(),
        Clip::norm(1.0),
    )?)
}

/// Products with every Var, in rayon's global pool where `rows` is large: candle holds the lock of
/// the Var and waits.
fn evaluate(vars: &[Var], rows: usize) -> Result<()> {
    for var in vars {
        let x = Tensor::ones((rows, var.dim(0)?), DType::F32, &Device::Cpu)?;
        let y = x.matmul(var)?.sum_all()?.to_scalar::<f32>()?;
        assert!(y.is_finite());
    }
    Ok(())
}

/// Calls `train` until `evaluate` has been called `EVALUATIONS` times on another thread.
fn train_beside(
    mut train: impl FnMut() -> Result<()>,
    evaluate: impl Fn() -> Result<()> + Sync,
) -> Result<()> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let evaluator = scope.spawn(|| {
            let result = (0..EVALUATIONS).try_for_each(|_| evaluate());
            done.store(true, Ordering::Relaxed);
            result
        });
        let mut steps = 0;
        while !done.load(Ordering::Relaxed) || steps < 3 {
            train()?;
            steps += 1;
        }
        evaluator.join().expect("no panic")
    })
}

#[test]
fn a_trainer_beside_an_evaluator_of_one_large_var() {
    with_pools("a_trainer_beside_an_evaluator_of_one_large_var", || {
        let vars = squares(1, 1024)?;
        let mut opt = adamw(&vars)?;
        let train = || Ok(opt.backward_step(&vars[0].sqr()?.sum_all()?)?);
        train_beside(train, || evaluate(&vars, 8))
    });
}

#[test]
fn a_trainer_beside_an_evaluator_of_many_small_vars() {
    with_pools("a_trainer_beside_an_evaluator_of_many_small_vars", || {
        let vars = squares(300, 64)?;
        let mut opt = adamw(&vars)?;
        let grads = gradients(&vars)?;
        train_beside(|| Ok(opt.step(&grads)?), || evaluate(&vars[..20], 256))
    });
}

#[test]
fn a_trainer_beside_evaluators_in_rayon_tasks() {
    with_pools("a_trainer_beside_evaluators_in_rayon_tasks", || {
        let mut vars = squares(100, 64)?;
        vars.push(square(512)?);
        let mut opt = adamw(&vars)?;
        let grads = gradients(&vars)?;
        // Small products: a task of candle's that waits for its parts, with a lock in its hand, may
        // take up another task of the same pool, and waits for itself then, whatever optimizer is
        // used.
        let evaluate = || {
            vars.par_iter()
                .try_for_each(|var| evaluate(std::slice::from_ref(var), 1))
        };
        train_beside(|| Ok(opt.step(&grads)?), evaluate)
    });
}

#[test]
fn several_optimizers_of_the_same_vars() {
    with_pools("several_optimizers_of_the_same_vars", || {
        let mut vars = squares(300, 64)?;
        vars.extend(squares(2, 512)?);
        let grads = gradients(&vars)?;
        let train = |steps: usize| -> Result<()> {
            let mut opt = adamw(&vars)?;
            (0..steps).try_for_each(|_| Ok(opt.step(&grads)?))
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| train(100))).collect();
            evaluate(&vars, 256)?;
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().expect("no panic"))
        })
    });
}

#[test]
fn optimizers_in_rayon_tasks() {
    with_pools("optimizers_in_rayon_tasks", || {
        let mut vars = squares(20, 64)?;
        vars.push(square(512)?);
        let shared = Mutex::new(adamw(&vars)?);
        let grads = gradients(&vars)?;
        (0..100).into_par_iter().try_for_each(|_| -> Result<()> {
            shared.lock().expect("no panic").step(&grads)?;
            let own = squares(1, 300)?;
            let mut opt = Sgd::from_named_vars(own.clone(), 0.1)?;
            Ok(opt.step(&gradients(&own)?)?)
        })?;
        assert_eq!(
            shared
                .into_inner()
                .expect("no panic")
                .last_report()
                .map(candle_grad_clip::StepReport::step),
            Some(100)
        );
        Ok(())
    });
}

#[test]
fn accumulators_of_the_same_gradients() {
    with_pools("accumulators_of_the_same_gradients", || {
        let mut vars = squares(300, 64)?;
        vars.push(square(512)?);
        let grads = gradients(&vars)?;
        let expected = total_norm(&grads, &vars, NormType::L2)?;
        let accumulate = || -> Result<()> {
            let mut sums = GradAccumulator::mean(vars.clone());
            for _ in 0..30 {
                sums.add(&grads)?;
                sums.add(&grads)?;
                let mean = sums.take_grads()?.expect("two micro-batches");
                assert_eq!(total_norm(mean, &vars, NormType::L2)?, expected);
            }
            Ok(())
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(accumulate)).collect();
            evaluate(&vars, 256)?;
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().expect("no panic"))
        })
    });
}

#[test]
fn free_functions_on_the_same_gradients() {
    with_pools("free_functions_on_the_same_gradients", || {
        let mut vars = squares(300, 64)?;
        vars.push(square(512)?);
        let grads = gradients(&vars)?;
        let clip = |limit: f64| -> Result<()> {
            // Its own store, of the same tensors.
            let mut grads = {
                let mut same = empty_store()?;
                for var in &vars {
                    same.insert(var, grads.get(var).expect("each has one").clone());
                }
                same
            };
            for i in 0..100 {
                clip_grad_norm(&mut grads, &vars, limit / f64::from(i + 1))?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(|| clip(1.0))).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().expect("no panic"))
        })?;
        // Both may have scaled what the other measured: never to more than the limit.
        assert!(total_norm(&grads, &vars, NormType::L2)? <= 0.01 * (1.0 + 1e-6));
        Ok(())
    });
}
