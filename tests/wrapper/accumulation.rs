//! Micro-batches added up are the big batch: to rounding, for any number of threads, with missing
//! and bad gradients.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{
    Clip, ClippedOptimizer, Error, GradAccumulator, NamedVars, NonFinite, clip_grad_norm,
};
use candle_nn::Optimizer;
use support::device::{on_every_backend, pool};
use support::gradients::{
    FLOATS, all_values, bits_of_gradients, bits_of_vars, empty_store, gradients_of, random_values,
    store_for, store_of, tensor, values,
};
use support::net::Net;

/// The net that the micro-batches train.
pub(super) fn net(dtype: DType) -> Result<Net> {
    Ok(Net::new(dtype, 3, 16, 0.5)?)
}

/// Mean squared error over the rows of `x`.
pub(super) fn loss(net: &Net, x: &Tensor) -> Result<Tensor> {
    Ok(net.errors(x, &x.sum_keepdim(1)?)?.mean_all()?)
}

pub(super) fn batch(dtype: DType) -> Result<Tensor> {
    Ok(tensor(&random_values(24 * 3, 99), (24, 3), dtype)?)
}

pub(super) fn assert_close(ours: &[f64], right: &[f64], tolerance: f64, what: &str) {
    assert_eq!(ours.len(), right.len(), "{what}");
    let largest = right.iter().fold(0f64, |max, x| max.max(x.abs()));
    for (a, b) in ours.iter().zip(right) {
        let close = (a - b).abs() <= tolerance * largest;
        assert!(close, "{what}: {a:e}, not {b:e}");
    }
}

#[test]
fn micro_batches_are_the_big_batch() -> Result<()> {
    on_every_backend(|| {
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-14), (DType::BF16, 3e-2)] {
            let (net, x) = (net(dtype)?, batch(dtype)?);
            let vars = NamedVars::from(&net.map);
            let whole = loss(&net, &x)?.backward()?;
            let whole = all_values(&gradients_of(&whole, vars.vars())?)?;
            for k in [1, 2, 3, 8] {
                let mut mean = GradAccumulator::mean(vars.clone());
                let mut sum = GradAccumulator::sum(vars.clone());
                for _round in 0..2 {
                    for part in x.chunk(k, 0)? {
                        mean.add(&loss(&net, &part)?.backward()?)?;
                        sum.add(&(loss(&net, &part)? / k as f64)?.backward()?)?;
                    }
                    assert_eq!(mean.micro_batches(), k as u64);
                    for (what, accumulator) in [("mean", &mut mean), ("sum", &mut sum)] {
                        let grads = accumulator.take_grads()?.unwrap();
                        let ours = all_values(&gradients_of(grads, vars.vars())?)?;
                        let what = format!("{what} of {k}, {dtype:?}");
                        assert_close(&ours, &whole, tolerance, &what);
                    }
                }
            }
        }
        Ok(())
    })
}

/// Trained with one clip and one step for each batch.
#[test]
fn training_by_micro_batches_is_training_by_batches() -> Result<()> {
    let train = |k: usize| -> Result<(Vec<f64>, Vec<f64>)> {
        let (net, x) = (net(DType::F64)?, batch(DType::F64)?);
        let sgd = Sgd::from_named_vars(&net.map, 0.1)?;
        let mut opt = ClippedOptimizer::wrap(sgd, &net.map, Clip::norm(0.5))?;
        let mut accumulator = GradAccumulator::mean(&net.map);
        let mut norms = Vec::new();
        for _ in 0..20 {
            for part in x.chunk(k, 0)? {
                accumulator.add(&loss(&net, &part)?.backward()?)?;
            }
            let report = opt.step_report(accumulator.take_grads()?.unwrap())?;
            norms.push(report.total_norm()?);
        }
        let vars = NamedVars::from(&net.map);
        let weights = vars
            .vars()
            .iter()
            .map(|var| var.detach())
            .collect::<Vec<_>>();
        Ok((norms, all_values(&weights)?))
    };
    let (norms, weights) = train(1)?;
    assert!(norms[0] > 0.5, "it clips: {norms:?}");
    for k in [2, 4, 24] {
        let (other_norms, other_weights) = train(k)?;
        assert_close(&other_norms, &norms, 1e-12, "norms");
        assert_close(&other_weights, &weights, 1e-12, "weights");
    }
    Ok(())
}

/// The case of PyTorch's issue 986: (2, 0) and then (0, 2), clipped to 1.
#[test]
fn one_clip_of_the_sum_is_not_one_of_each_micro_batch() -> Result<()> {
    on_every_backend(|| {
        let micro_batches = [[2.0, 0.0], [0.0, 2.0]];
        let (vars, _) = store_of(&[tensor(&micro_batches[0], 2, DType::F64)?])?;
        let mut accumulator = GradAccumulator::sum(vars.clone());
        let mut each = GradAccumulator::sum(vars.clone());
        for values in &micro_batches {
            let mut grads = store_for(&vars, &[tensor(values, 2, DType::F64)?]);
            accumulator.add(&grads)?;
            clip_grad_norm(&mut grads, &vars, 1.0)?;
            each.add(&grads)?;
        }
        let grads = accumulator.take_grads()?.unwrap();
        let norm = clip_grad_norm(grads, &vars, 1.0)?;
        assert!((norm - 8f64.sqrt()).abs() < 1e-12);
        let once = all_values(&gradients_of(grads, &vars)?)?;
        assert_close(&once, &[0.5f64.sqrt(); 2], 1e-6, "once");
        let each = all_values(&gradients_of(each.take_grads()?.unwrap(), &vars)?)?;
        assert_close(&each, &[1.0; 2], 1e-6, "each");
        Ok(())
    })
}

/// Small, empty, scalar, and more than one block, in all dtypes.
pub(super) fn gradients(seed: u64) -> Result<Vec<Tensor>> {
    let shapes: [&[usize]; 5] = [&[7, 5], &[], &[0, 3], &[200_003], &[1025]];
    let mut all = Vec::new();
    for (i, shape) in shapes.into_iter().enumerate() {
        for dtype in FLOATS {
            let values = random_values(shape.iter().product(), 100 * seed + i as u64);
            all.push(tensor(&values, shape, dtype)?);
        }
    }
    Ok(all)
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let micro_batches: Vec<Vec<Tensor>> = (0..3).map(gradients).collect::<Result<_>>()?;
    let run = || -> Result<_> {
        let (vars, _) = store_of(&micro_batches[0])?;
        let mut accumulator = GradAccumulator::mean(vars.clone());
        for gradients in &micro_batches {
            accumulator.add(&store_for(&vars, gradients))?;
        }
        let grads = accumulator.take_grads()?.unwrap();
        Ok(bits_of_gradients(grads, &vars)?)
    };
    let first = run()?;
    for threads in [1, 2, 3, 8] {
        assert!(pool(threads)?.install(run)? == first, "{threads} threads");
    }
    Ok(())
}

/// f16 values whose f16 sum is infinite, and bf16 ones whose bf16 sum stands still.
#[test]
fn halves_are_added_in_full_precision_and_rounded_once() -> Result<()> {
    on_every_backend(|| {
        for (dtype, value, times, right) in [
            (DType::F16, 60000.0, 8, 60000.0),
            (DType::BF16, 1.0, 1000, 1.0),
        ] {
            let (vars, store) = store_of(&[tensor(&[value], 1, dtype)?])?;
            let mut accumulator = GradAccumulator::mean(vars.clone());
            for _ in 0..times {
                accumulator.add(&store)?;
            }
            let grads = accumulator.take_grads()?.unwrap();
            let grad = grads.get(&vars[0]).unwrap();
            assert_eq!(grad.dtype(), dtype);
            assert_close(&values(grad)?, &[right], 1e-2, "mean");
        }
        let (vars, store) = store_of(&[tensor(&[60000.0], 1, DType::F16)?])?;
        let mut sum = GradAccumulator::sum(vars.clone());
        sum.add(&store)?;
        sum.add(&store)?;
        let grads = sum.take_grads()?.unwrap();
        assert_eq!(values(grads.get(&vars[0]).unwrap())?, [f64::INFINITY]);
        Ok(())
    })
}

#[test]
fn a_missing_gradient_counts_as_zero_and_a_var_without_any_is_missing() -> Result<()> {
    on_every_backend(|| {
        let one = |value: f64| tensor(&[value], 1, DType::F32);
        let named = |name: &str| -> Result<(String, Var)> {
            Ok((name.to_string(), Var::from_tensor(&one(0.0)?)?))
        };
        let named = vec![
            named("always")?,
            named("late")?,
            named("early")?,
            named("never")?,
        ];
        let vars: Vec<Var> = named.iter().map(|(_, var)| var.clone()).collect();
        let mut accumulator = GradAccumulator::mean(named.clone());
        let sgd = Sgd::from_named_vars(named.clone(), 1.0)?;
        let mut opt = ClippedOptimizer::wrap(sgd, named, Clip::none())?;
        for _round in 0..2 {
            let mut first = empty_store()?;
            first.insert(&vars[0], one(2.0)?);
            first.insert(&vars[2], one(8.0)?);
            let mut second = empty_store()?;
            second.insert(&vars[0], one(4.0)?);
            second.insert(&vars[1], one(6.0)?);
            accumulator.add(&first)?;
            accumulator.add(&second)?;
            let grads = accumulator.take_grads()?.unwrap();
            assert_eq!(values(grads.get(&vars[0]).unwrap())?, [3.0]);
            assert_eq!(values(grads.get(&vars[1]).unwrap())?, [3.0]);
            assert_eq!(values(grads.get(&vars[2]).unwrap())?, [4.0]);
            assert!(grads.get(&vars[3]).is_none());
            assert_eq!(opt.step_report(grads)?.missing_grads(), ["never"]);
        }
        Ok(())
    })
}

#[test]
fn a_bad_micro_batch_is_treated_as_the_policy_says() -> Result<()> {
    on_every_backend(|| {
        for dtype in FLOATS {
            let of = |values: &[f64]| tensor(values, 3, dtype);
            let good = of(&[1.0, 2.0, 3.0])?;
            let bad = of(&[f64::NAN, f64::NEG_INFINITY, 5.0])?;
            let (vars, _) = store_of(&[good.clone(), good.clone()])?;
            let named = vec![
                ("a".to_string(), vars[0].clone()),
                ("b".to_string(), vars[1].clone()),
            ];
            let run = |policy| -> Result<_> {
                let mut accumulator = GradAccumulator::mean(named.clone()).non_finite(policy);
                accumulator.add(&store_for(&vars, &[good.clone(), good.clone()]))?;
                let result = accumulator.add(&store_for(&vars, &[good.clone(), bad.clone()]));
                let counts = (accumulator.micro_batches(), accumulator.dropped());
                let grads = accumulator.take_grads()?.unwrap();
                Ok((result, counts, all_values(&gradients_of(grads, &vars)?)?))
            };
            let alone = [1.0, 2.0, 3.0, 1.0, 2.0, 3.0];
            let (result, counts, left) = run(NonFinite::SkipStep)?;
            assert!(result.is_ok());
            assert_eq!((counts, &left[..]), ((1, 1), &alone[..]));
            let (result, counts, left) = run(NonFinite::Error)?;
            let error = result.unwrap_err();
            assert!(
                matches!(&error, Error::NonFinite { var, nan: 1, infinite: 1, .. } if var == "b"),
                "{error}"
            );
            assert_eq!((counts, &left[..]), ((1, 0), &alone[..]));
            let (_, counts, zeroed) = run(NonFinite::Zero)?;
            assert_eq!(
                (counts, &zeroed[..]),
                ((2, 0), &[1.0, 2.0, 3.0, 0.5, 1.0, 4.0][..])
            );
            let (_, counts, propagated) = run(NonFinite::Propagate)?;
            assert_eq!(counts, (2, 0));
            assert!(propagated[3].is_nan());
            assert_eq!(propagated[4..], [f64::NEG_INFINITY, 4.0]);
        }
        Ok(())
    })
}

#[test]
fn a_gradient_that_does_not_fit_leaves_the_sum_as_it_was() -> Result<()> {
    on_every_backend(|| {
        let good = tensor(&[1.0, 2.0], 2, DType::F32)?;
        let (vars, store) = store_of(&[good.clone(), good.clone()])?;
        let mut accumulator = GradAccumulator::mean(vars.clone());
        accumulator.add(&store)?;
        for bad in [
            tensor(&[1.0; 3], 3, DType::F32)?,
            tensor(&[1.0; 2], 2, DType::F64)?,
        ] {
            let error = accumulator
                .add(&store_for(&vars, &[good.clone(), bad]))
                .unwrap_err();
            assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        }
        assert_eq!(accumulator.micro_batches(), 1);
        let grads = accumulator.take_grads()?.unwrap();
        let left = all_values(&gradients_of(grads, &vars)?)?;
        assert_eq!(left, [1.0, 2.0, 1.0, 2.0]);
        Ok(())
    })
}

/// Broadcast and transposed gradients, one that is a Var, one shared by two Vars, and one of the
/// accumulator's own buffers.
#[test]
fn gradients_of_any_layout_are_added_and_none_is_changed() -> Result<()> {
    on_every_backend(|| {
        let row = tensor(&[1.0, 2.0], 2, DType::F32)?;
        let square = tensor(&[1.0, 2.0, 3.0, 4.0], (2, 2), DType::F32)?;
        let weight = Var::from_tensor(&square)?;
        let gradients = [
            row.broadcast_as((2, 2))?,
            square.t()?,
            weight.as_tensor().clone(),
            square.clone(),
            square.clone(),
        ];
        let (vars, store) = store_of(&gradients)?;
        let before = bits_of_gradients(&store, &vars)?;
        let mut accumulator = GradAccumulator::sum(vars.clone());
        let mut taken = Vec::new();
        for _round in 0..2 {
            accumulator.add(&store)?;
            accumulator.add(&store)?;
            let grads = accumulator.take_grads()?.unwrap();
            taken = gradients_of(grads, &vars)?;
            for (ours, gradient) in taken.iter().zip(&gradients) {
                let twice: Vec<f64> = values(gradient)?.iter().map(|x| 2.0 * x).collect();
                assert_eq!(values(ours)?, twice);
            }
            // The first sum is the caller's gradient, or what it lent: edited, it must not change
            // that.
            clip_grad_norm(grads, &vars, 0.1)?;
            assert_eq!(bits_of_gradients(&store, &vars)?, before);
        }
        accumulator.add(&store)?;
        accumulator.add(&store_for(&vars, &taken))?; // whose storage is the sum's
        accumulator.take_grads()?;
        assert_eq!(bits_of_gradients(&store, &vars)?, before);
        Ok(())
    })
}

#[test]
fn one_micro_batch_is_copied() -> Result<()> {
    on_every_backend(|| {
        let (vars, store) = store_of(&gradients(5)?)?;
        let before = bits_of_gradients(&store, &vars)?;
        let mut accumulator = GradAccumulator::mean(vars.clone());
        accumulator.add(&store)?;
        let grads = accumulator.take_grads()?.unwrap();
        assert_eq!(bits_of_gradients(grads, &vars)?, before);
        clip_grad_norm(grads, &vars, 0.1)?;
        assert_eq!(bits_of_gradients(&store, &vars)?, before);
        assert!(bits_of_vars(&vars)?.iter().flatten().all(|bits| *bits == 0));
        Ok(())
    })
}

/// What the rounding to f16 makes infinite is not finite to the step that follows.
#[test]
fn a_sum_that_f16_does_not_hold_skips_the_step() -> Result<()> {
    on_every_backend(|| {
        let (vars, store) = store_of(&[tensor(&[60000.0], 1, DType::F16)?])?;
        let mut sum = GradAccumulator::sum(vars.clone()).non_finite(NonFinite::SkipStep);
        let sgd = candle_nn::SGD::new(vars.clone(), 0.1)?;
        let mut opt = ClippedOptimizer::wrap(sgd, vars.clone(), Clip::norm(1.0))?;
        let before = bits_of_vars(&vars)?;
        sum.add(&store)?;
        sum.add(&store)?;
        assert!(opt.step_report(sum.take_grads()?.unwrap())?.skipped()?);
        assert_eq!(bits_of_vars(&vars)?, before);
        Ok(())
    })
}
