//! Windows of micro-batches: incomplete, weighted, empty, or of other Vars.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{Clip, ClippedOptimizer, Error, GradAccumulator, NamedVars, NonFinite};
use support::device::on_every_backend;
use support::gradients::{
    all_values, bits_of_gradients, empty_store, gradients_of, store_for, store_of, tensor, values,
};

use super::accumulation::{assert_close, batch, gradients, loss, net};

#[test]
fn no_micro_batch_is_no_step() -> Result<()> {
    let bad = tensor(&[f64::NAN], 1, DType::F32)?;
    let (vars, store) = store_of(&[bad])?;
    let mut accumulator = GradAccumulator::mean(vars).non_finite(NonFinite::SkipStep);
    assert!(accumulator.take_grads()?.is_none());
    accumulator.add(&store)?;
    assert!(accumulator.take_grads()?.is_none(), "all were dropped");
    assert_eq!(accumulator.dropped(), 1);
    Ok(())
}

/// A last window with fewer micro-batches is divided by the number that it has.
#[test]
fn the_mean_of_an_incomplete_window_is_that_of_what_it_has() -> Result<()> {
    on_every_backend(|| {
        let (vars, _) = store_of(&[tensor(&[0.0], 1, DType::F32)?])?;
        let mut accumulator = GradAccumulator::mean(vars.clone());
        for (window, right) in [(&[1.0, 2.0, 3.0, 6.0][..], 3.0), (&[5.0, 8.0], 6.5)] {
            for value in window {
                accumulator.add(&store_for(&vars, &[tensor(&[*value], 1, DType::F32)?]))?;
            }
            let grads = accumulator.take_grads()?.unwrap();
            assert_eq!(values(grads.get(&vars[0]).unwrap())?, [right]);
        }
        Ok(())
    })
}

/// Parts of 5, 1 and 18 rows, weighted by their rows, are the batch of 24.
#[test]
fn weighted_micro_batches_of_any_size_are_the_big_batch() -> Result<()> {
    on_every_backend(|| {
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-14), (DType::BF16, 3e-2)] {
            let (net, x) = (net(dtype)?, batch(dtype)?);
            let vars = NamedVars::from(&net.map);
            let whole = loss(&net, &x)?.backward()?;
            let whole = all_values(&gradients_of(&whole, vars.vars())?)?;
            let mut mean = GradAccumulator::mean(vars.clone());
            let mut sum = GradAccumulator::sum(vars.clone());
            for _round in 0..2 {
                for (start, rows) in [(0, 5), (5, 1), (6, 18)] {
                    let grads = loss(&net, &x.narrow(0, start, rows)?)?.backward()?;
                    mean.add_weighted(&grads, rows as f64)?;
                    sum.add_weighted(&grads, rows as f64 / 24.0)?;
                }
                for (what, accumulator) in [("mean", &mut mean), ("sum", &mut sum)] {
                    let grads = accumulator.take_grads()?.unwrap();
                    let ours = all_values(&gradients_of(grads, vars.vars())?)?;
                    assert_close(&ours, &whole, tolerance, &format!("{what}, {dtype:?}"));
                }
            }
        }
        Ok(())
    })
}

#[test]
fn a_weight_of_one_has_the_bits_of_none_and_only_ratios_matter_to_the_mean() -> Result<()> {
    on_every_backend(|| {
        let micro_batches: Vec<Vec<Tensor>> = (0..3).map(gradients).collect::<Result<_>>()?;
        let (vars, _) = store_of(&micro_batches[0])?;
        let run = |weights: Option<[f64; 3]>| -> Result<_> {
            let mut accumulator = GradAccumulator::mean(vars.clone());
            for (i, gradients) in micro_batches.iter().enumerate() {
                let store = store_for(&vars, gradients);
                match weights {
                    Some(weights) => accumulator.add_weighted(&store, weights[i])?,
                    None => accumulator.add(&store)?,
                }
            }
            Ok(bits_of_gradients(
                accumulator.take_grads()?.unwrap(),
                &vars,
            )?)
        };
        assert!(run(Some([1.0; 3]))? == run(None)?);
        // Powers of two are exact; as f32 these would be 0 and infinite.
        let right = run(Some([1.0, 3.0, 0.5]))?;
        for unit in [2f64.powi(-200), 2f64.powi(300)] {
            assert!(run(Some([unit, 3.0 * unit, 0.5 * unit]))? == right);
        }
        Ok(())
    })
}

#[test]
fn weights_that_are_none_are_refused_and_a_weight_of_zero_is_left_out() -> Result<()> {
    on_every_backend(|| {
        let one = |value: f64| tensor(&[value], 1, DType::F32);
        let (vars, store) = store_of(&[one(2.0)?])?;
        let bad = store_for(&vars, &[one(f64::NAN)?]);
        for policy in [NonFinite::Propagate, NonFinite::Error, NonFinite::SkipStep] {
            let mut accumulator = GradAccumulator::mean(vars.clone()).non_finite(policy);
            accumulator.add_weighted(&store, 3.0)?;
            for weight in [-1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let error = accumulator.add_weighted(&store, weight).unwrap_err();
                assert!(
                    matches!(&error, Error::InvalidOption { name: "weight", .. }),
                    "{error}"
                );
            }
            accumulator.add_weighted(&bad, 0.0)?;
            assert_eq!((accumulator.micro_batches(), accumulator.dropped()), (1, 0));
            let grads = accumulator.take_grads()?.unwrap();
            assert_eq!(values(grads.get(&vars[0]).unwrap())?, [2.0]);
            accumulator.add_weighted(&store, 0.0)?;
            assert!(
                accumulator.take_grads()?.is_none(),
                "the sum of the weights is 0"
            );
        }
        let mut accumulator = GradAccumulator::mean(vars.clone());
        accumulator.add_weighted(&store, 1e-300)?;
        assert!(accumulator.add_weighted(&store, 1e300).is_err());
        Ok(())
    })
}

#[test]
fn windows_that_end_empty_in_a_row_become_an_error() -> Result<()> {
    let one = |value: f64| tensor(&[value], 1, DType::F32);
    let (vars, good) = store_of(&[one(1.0)?])?;
    let bad = store_for(&vars, &[one(f64::INFINITY)?]);
    let mut accumulator = GradAccumulator::mean(vars.clone())
        .non_finite(NonFinite::SkipStep)
        .max_skips(2);
    for _ in 0..2 {
        for _ in 0..2 {
            accumulator.add(&bad)?;
            accumulator.add(&bad)?;
            assert!(accumulator.take_grads()?.is_none());
            assert!(accumulator.take_grads()?.is_none(), "no window");
        }
        accumulator.add(&bad)?;
        accumulator.add(&good)?;
        assert!(
            accumulator.take_grads()?.is_some(),
            "the count starts again"
        );
    }
    for _ in 0..2 {
        accumulator.add(&bad)?;
        assert!(accumulator.take_grads()?.is_none());
    }
    accumulator.add(&bad)?;
    let error = accumulator.take_grads().map(drop).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooManyEmptyWindows {
                windows: 3,
                max_skips: 2,
                dropped: 13
            }
        ),
        "{error}"
    );
    // Ten by default.
    let mut accumulator = GradAccumulator::mean(vars).non_finite(NonFinite::SkipStep);
    for window in 1..=11 {
        accumulator.add(&bad)?;
        assert_eq!(accumulator.take_grads().is_err(), window == 11);
    }
    Ok(())
}

#[test]
fn a_store_of_other_gradients_is_an_error() -> Result<()> {
    let one = |value: f64| tensor(&[value], 1, DType::F32);
    let (vars, good) = store_of(&[one(1.0)?])?;
    let (_, others) = store_of(&[one(2.0)?])?;
    for policy in [
        NonFinite::Propagate,
        NonFinite::Error,
        NonFinite::SkipStep,
        NonFinite::Zero,
    ] {
        let mut accumulator = GradAccumulator::mean(vars.clone()).non_finite(policy);
        accumulator.add(&good)?;
        for weight in [1.0, 0.0] {
            let error = accumulator.add_weighted(&others, weight).unwrap_err();
            assert!(
                matches!(&error, Error::NoGradients { grads: 1, vars: 1 }),
                "{error}"
            );
        }
        accumulator.add(&empty_store()?)?; // nothing at all: all gradients are 0
        assert_eq!(accumulator.micro_batches(), 2);
        let grads = accumulator.take_grads()?.unwrap();
        assert_eq!(values(grads.get(&vars[0]).unwrap())?, [0.5]);
    }
    Ok(())
}

/// The optimizer's Vars that the accumulator was not given are told by name.
#[test]
fn a_step_names_the_vars_that_the_accumulator_lacks() -> Result<()> {
    let net = net(DType::F32)?;
    let all = NamedVars::from(&net.map);
    let named = all.names().iter().cloned().zip(all.vars().iter().cloned());
    let (head, hidden): (Vec<_>, Vec<_>) = named.partition(|(name, _)| name.starts_with("head"));
    let mut accumulator = GradAccumulator::mean(head);
    let sgd = Sgd::from_named_vars(&net.map, 0.1)?;
    let mut opt = ClippedOptimizer::wrap(sgd, &net.map, Clip::norm(1.0))?;
    accumulator.add(&loss(&net, &batch(DType::F32)?)?.backward()?)?;
    let report = opt.step_report(accumulator.take_grads()?.unwrap())?;
    let names: Vec<String> = hidden.into_iter().map(|(name, _)| name).collect();
    assert_eq!(report.missing_grads(), names);
    Ok(())
}
