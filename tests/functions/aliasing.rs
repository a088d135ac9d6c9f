//! Storage that is shared: nothing is scaled twice, no weight is touched, nothing hangs.

use std::sync::mpsc;
use std::time::Duration;

use support::device::{backends, device, kernels, pool};

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::{
    Clip, ClippedOptimizer, NormType, clip_by_global_norm, clip_grad_norm, clip_grad_value,
    clip_grads_with_norm, total_norm,
};
use candle_nn::{Optimizer, SGD};
use rayon::prelude::*;
use support::gradients::{
    all_values, bits, empty_store, gradients_of, random_values, store_for, tensor, values, var_for,
};
use support::oracle::{self, assert_all_close, assert_close};

/// A way to edit gradients, and what it should do to each element.
type Editor = (
    &'static str,
    fn(&mut GradStore, &[Var], f64) -> candle_grad_clip::Result<()>,
    fn(f64, f64) -> f64,
);

/// Every function that edits in place; the number is the total norm.
const EDITORS: [Editor; 3] = [
    (
        "clip_grad_norm",
        |store, vars, norm| clip_grad_norm(store, vars, norm / 4.0).map(drop),
        |x, norm| x * oracle::clip_coef(norm, norm / 4.0, 1e-6),
    ),
    (
        "clip_grads_with_norm",
        |store, vars, norm| clip_grads_with_norm(store, vars, norm / 4.0, norm),
        |x, norm| x * oracle::clip_coef(norm, norm / 4.0, 1e-6),
    ),
    (
        "clip_grad_value",
        |store, vars, _| clip_grad_value(store, vars, 0.5),
        |x, _| x.clamp(-0.5, 0.5),
    ),
];

/// Edits the gradients in every way, on every backend, and compares each with the plain equation.
/// `make` gives Vars and gradients, and tensors whose values must stay.
fn check(make: impl Fn() -> Result<(Vec<Var>, Vec<Tensor>, Vec<Tensor>)>) -> Result<()> {
    for (name, edit, right) in EDITORS {
        for backend in backends() {
            let what = format!("{name} {backend:?}");
            let (vars, gradients, untouched) = make()?;
            let before = all_values(&gradients)?;
            let kept: Vec<_> = untouched
                .iter()
                .map(bits)
                .collect::<candle_core::Result<_>>()?;
            let norm = oracle::norm(&before, 2.0);
            let mut store = store_for(&vars, &gradients);
            assert_close(total_norm(&store, &vars, NormType::L2)?, norm, 1e-12, &what);

            let (copied, _) = clip_by_global_norm(&store, &vars, norm / 2.0, None)?;
            let halves: Vec<f64> = before.iter().map(|x| x / 2.0).collect();
            assert_all_close(
                &all_values(&gradients_of(&copied, &vars)?)?,
                &halves,
                1e-6,
                &what,
            );
            assert_eq!(all_values(&gradients_of(&store, &vars)?)?, before, "{what}");

            backend::with_backend(backend, || edit(&mut store, &vars, norm))?;
            let expected: Vec<f64> = before.iter().map(|x| right(*x, norm)).collect();
            let after = all_values(&gradients_of(&store, &vars)?)?;
            assert_all_close(&after, &expected, 1e-6, &what);
            for (tensor, kept) in untouched.iter().zip(kept) {
                assert_eq!(bits(tensor)?, kept, "{what}: must not be touched");
            }
        }
    }
    Ok(())
}

fn vars_for(gradients: &[Tensor]) -> Result<Vec<Var>> {
    let vars: candle_core::Result<_> = gradients.iter().map(var_for).collect();
    Ok(vars?)
}

fn random(n: usize, seed: u64) -> Result<Tensor> {
    Ok(tensor(&random_values(n, seed), n, DType::F32)?)
}

#[test]
fn two_entries_with_one_storage() -> Result<()> {
    for n in [5, 70_000] {
        check(|| {
            let one = random(n, 1)?;
            let gradients = vec![one.clone(), random(7, 2)?, one.clone(), one];
            Ok((vars_for(&gradients)?, gradients, vec![]))
        })?;
    }
    Ok(())
}

#[test]
fn a_gradient_that_is_its_var_or_shares_its_storage() -> Result<()> {
    for n in [6, 70_000] {
        let weights = |seed| -> Result<Var> { Ok(Var::from_tensor(&random(n, seed)?)?) };
        check(|| {
            let (a, b) = (weights(1)?, weights(2)?);
            let gradients = vec![a.as_tensor().clone(), random(n, 3)?];
            let kept = vec![a.as_tensor().clone(), b.as_tensor().clone()];
            Ok((vec![a, b], gradients, kept))
        })?;
        check(|| {
            // The gradient of one Var is a view of another's values.
            let (a, b) = (weights(1)?, weights(2)?);
            let gradients = vec![b.detach(), a.detach()];
            let kept = vec![a.as_tensor().clone(), b.as_tensor().clone()];
            Ok((vec![a, b], gradients, kept))
        })?;
    }
    Ok(())
}

#[test]
fn views_of_one_storage() -> Result<()> {
    for rows in [4, 300] {
        check(|| {
            let whole = tensor(&random_values(rows * 300, 1), (rows, 300), DType::F32)?;
            let half = rows / 2;
            let gradients = vec![
                whole.narrow(0, 0, half)?,
                whole.narrow(0, half, half)?,
                whole.narrow(0, 1, half)?, // overlaps both
                whole.narrow(1, 10, 100)?, // strided
                whole.clone(),
            ];
            Ok((vars_for(&gradients)?, gradients, vec![]))
        })?;
    }
    Ok(())
}

#[test]
fn broadcast_and_transposed_gradients() -> Result<()> {
    for n in [3, 300] {
        check(|| {
            let column = random(n, 1)?;
            let matrix = tensor(&random_values(n * n, 2), (n, n), DType::F32)?;
            let gradients = vec![
                column.unsqueeze(0)?.broadcast_as((n, n))?,
                column.unsqueeze(1)?.broadcast_as((n, n))?,
                matrix.t()?,
                Tensor::full(0.75f32, (), device())?.broadcast_as((2, n))?,
            ];
            Ok((vars_for(&gradients)?, gradients, vec![]))
        })?;
    }
    Ok(())
}

#[test]
fn an_unlisted_entry_with_the_storage_of_a_listed_one() -> Result<()> {
    for (name, edit, right) in EDITORS {
        for backend in backends() {
            let what = format!("{name} {backend:?}");
            let shared = random(8, 1)?;
            let before = values(&shared)?;
            let (listed, unlisted) = (var_for(&shared)?, var_for(&shared)?);
            let mut store = store_for(
                &[listed.clone(), unlisted.clone()],
                &[shared.clone(), shared],
            );
            let norm = oracle::norm(&before, 2.0);
            backend::with_backend(backend, || {
                edit(&mut store, std::slice::from_ref(&listed), norm)
            })?;
            let expected: Vec<f64> = before.iter().map(|x| right(*x, norm)).collect();
            assert_all_close(
                &values(store.get(&listed).unwrap())?,
                &expected,
                1e-6,
                &what,
            );
            assert_eq!(values(store.get(&unlisted).unwrap())?, before, "{what}");
        }
    }
    Ok(())
}

#[test]
fn shared_storage_in_one_step_of_an_optimizer() -> Result<()> {
    for backend in backends() {
        let var = Var::new(&[3f64, 4.0], device())?;
        let other = Var::new(&[0f64, 0.0], device())?;
        let vars = vec![var.clone(), other.clone()];
        // Both gradients are the first Var itself: the norm is sqrt(50).
        let mut store = empty_store()?;
        store.insert(&var, var.as_tensor().clone());
        store.insert(&other, var.as_tensor().clone());
        let inner = SGD::new(vars.clone(), 1.0)?;
        let mut opt = ClippedOptimizer::wrap(inner, vars, Clip::norm(1.0).eps(0.0))?;
        let report = backend::with_backend(backend, || opt.step_report(&store))?;
        let norm = 50f64.sqrt();
        assert_close(report.total_norm()?, norm, 1e-12, "both count");
        let coef = 1.0 / norm;
        let moved = [3.0 - 3.0 * coef, 4.0 - 4.0 * coef];
        assert_all_close(&values(&var)?, &moved, 1e-12, "one step");
        assert_all_close(
            &values(&other)?,
            &[-3.0 * coef, -4.0 * coef],
            1e-12,
            "one step",
        );
    }
    Ok(())
}

/// Fails instead of hanging.
fn within_a_minute(f: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || done.send(f()));
    wait.recv_timeout(Duration::from_secs(60))
        .map_err(|_| anyhow::anyhow!("it hangs"))?
}

#[test]
fn large_shared_gradients_on_eight_threads_do_not_hang() -> Result<()> {
    within_a_minute(|| {
        pool(8)?.install(|| {
            let shared = random(300_000, 1)?;
            let gradients: Vec<Tensor> = (0..24).map(|_| shared.clone()).collect();
            let vars = vars_for(&gradients)?;
            let mut store = store_for(&vars, &gradients);
            for round in 1..4 {
                clip_grad_norm(&mut store, &vars, 1.0 / f64::from(round))?;
                clip_grad_value(&mut store, &vars, 1e-3 / f64::from(round))?;
            }
            anyhow::Ok(())
        })
    })
}

#[test]
fn calls_from_inside_a_rayon_pool_do_not_hang() -> Result<()> {
    within_a_minute(|| {
        pool(8)?.install(|| {
            // Each task has its own store; all read the same Vars and some of the same
            // gradients, as models that share an embedding do.
            let shared = random(100_000, 1)?;
            let vars = vars_for(&[shared.clone(), random(70_000, 2)?, random(3, 3)?])?;
            (0..32u64).into_par_iter().try_for_each(|task| {
                let gradients = [shared.clone(), random(70_000, task)?, random(3, task)?];
                let store = store_for(&vars, &gradients);
                total_norm(&store, &vars, NormType::L2)?;
                let (mut clipped, _) = clip_by_global_norm(&store, &vars, 1.0, None)?;
                clip_grad_value(&mut clipped, &vars, 1e-3)?;
                let own: Vec<Tensor> = gradients_of(&clipped, &vars)?;
                assert!(all_values(&own)?.iter().all(|x| x.abs() <= 1.01e-3));
                anyhow::Ok(())
            })
        })
    })
}

#[test]
fn a_weight_of_another_model_given_as_a_gradient_is_not_scaled() -> Result<()> {
    let listed = Var::zeros(2, DType::F32, device())?;
    let weight = Var::new(&[3f32, 4.0], device())?;
    let mut grads = empty_store()?;
    grads.insert(&listed, weight.as_tensor().clone());
    assert_eq!(
        clip_grad_norm(&mut grads, std::slice::from_ref(&listed), 1.0)?,
        5.0
    );
    assert_eq!(weight.to_vec1::<f32>()?, [3.0, 4.0]);
    let clipped = grads.get(&listed).unwrap().to_vec1::<f32>()?;
    assert!((clipped[0] - 0.6).abs() < 1e-6, "{clipped:?}");
    Ok(())
}

/// Keeps the gradient tensors it got, as an optimizer may that hands them out.
struct Keeper(Vec<Var>, Vec<Tensor>);

impl Optimizer for Keeper {
    type Config = ();
    fn new(vars: Vec<Var>, (): ()) -> candle_core::Result<Self> {
        Ok(Self(vars, Vec::new()))
    }
    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        self.1 = self
            .0
            .iter()
            .filter_map(|var| grads.get(var).cloned())
            .collect();
        Ok(())
    }
    fn learning_rate(&self) -> f64 {
        1.0
    }
    fn set_learning_rate(&mut self, _: f64) {}
}

#[test]
fn copies_that_come_back_as_gradients_are_not_written_to() -> Result<()> {
    let vars: Vec<Var> = (0..2)
        .map(|_| Var::zeros(2, DType::F64, device()))
        .collect::<candle_core::Result<_>>()?;
    let keeper = Keeper::new(vars.clone(), ())?;
    let mut opt = ClippedOptimizer::wrap(keeper, vars.clone(), Clip::norm(1.0).eps(0.0))?;
    let mut grads = empty_store()?;
    grads.insert(&vars[0], Tensor::new(&[30f64, 0.0], device())?);
    grads.insert(&vars[1], Tensor::new(&[0f64, 40.0], device())?);
    opt.step_report(&grads)?;
    // What the inner optimizer got, crossed over, is the next step's store.
    let kept = opt.inner().1.clone();
    let mut next = empty_store()?;
    next.insert(&vars[0], kept[1].clone());
    next.insert(&vars[1], kept[0].clone());
    opt.set_clip(Clip::norm(0.1).eps(0.0))?;
    opt.step_report(&next)?;
    assert_eq!(kept[0].to_vec1::<f64>()?, [0.6, 0.0]);
    assert_eq!(kept[1].to_vec1::<f64>()?, [0.0, 0.8]);
    let got = &opt.inner().1;
    assert!((got[0].to_vec1::<f64>()?[1] - 0.08).abs() < 1e-12);
    assert!((got[1].to_vec1::<f64>()?[0] - 0.06).abs() < 1e-12);
    Ok(())
}

#[test]
fn of_gradients_that_share_storage_the_first_contiguous_one_keeps_it() -> Result<()> {
    for (name, edit, right) in EDITORS {
        let whole = tensor(&random_values(12, 1), (4, 3), DType::F32)?;
        let before = values(&whole)?;
        let gradients = [
            whole.t()?,             // not contiguous
            whole.narrow(0, 1, 2)?, // the first that is
            whole.narrow(0, 0, 2)?, // overlaps it
            whole.clone(),
        ];
        let norm = oracle::norm(&all_values(&gradients)?, 2.0);
        let vars = vars_for(&gradients)?;
        let mut store = store_for(&vars, &gradients);
        backend::with_backend(kernels(), || edit(&mut store, &vars, norm))?;
        // Only the rows 1 and 2 of the caller's tensor change: what the second entry covers.
        let mut expected = before;
        for x in &mut expected[3..9] {
            *x = right(*x, norm);
        }
        assert_all_close(&values(&whole)?, &expected, 1e-6, name);
        let entry = |i: usize| values(store.get(&vars[i]).unwrap());
        assert_eq!(entry(1)?, values(&whole)?[3..9], "{name}: in place");
        // A write to that storage does not reach the others.
        let others = [entry(0)?, entry(2)?, entry(3)?];
        store.get(&vars[1]).unwrap().zero_set()?;
        assert_eq!(values(&whole)?[3..9], [0.0; 6], "{name}: shared");
        let entry = |i: usize| values(store.get(&vars[i]).unwrap());
        assert_eq!([entry(0)?, entry(2)?, entry(3)?], others, "{name}");
    }
    Ok(())
}

#[test]
fn an_entry_that_shares_storage_with_an_unlisted_one_leaves_the_callers_tensor() -> Result<()> {
    for (name, edit, _) in EDITORS {
        let whole = tensor(&random_values(12, 1), (4, 3), DType::F32)?;
        let before = bits(&whole)?;
        let gradients = [whole.narrow(0, 0, 2)?, whole.narrow(0, 2, 2)?];
        let vars = vars_for(&gradients)?;
        let mut store = store_for(&vars, &gradients);
        let norm = oracle::norm(&values(&gradients[0])?, 2.0);
        backend::with_backend(kernels(), || edit(&mut store, &vars[..1], norm))?;
        assert_eq!(bits(&whole)?, before, "{name}");
    }
    Ok(())
}
