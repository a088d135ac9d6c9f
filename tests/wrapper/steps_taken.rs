//! Which steps count as taken, and which as skipped in a row.

use anyhow::Result;
use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error};
use candle_nn::{Optimizer, ParamsAdamW};
use support::checkpoints::{Folder, edited};
use support::for_every_row;
use support::gradients::{bits_of_vars, loss_with_gradients, store_for, tensor};
use support::optimizers::Failing;
use support::registry::Row;

use super::non_finite::bad_gradients;

/// NaN, NaN, an inner error, NaN: the third in a row, as no step was taken in between.
#[test]
fn only_a_step_that_was_taken_ends_the_skips_in_a_row() -> Result<()> {
    let w = Var::from_tensor(&tensor(&[1.0, 2.0], 2, candle_core::DType::F32)?)?;
    let vars = vec![w.clone()];
    let of = |x: f64| -> Result<GradStore> {
        let gradient = tensor(&[x, 1.0], 2, candle_core::DType::F32)?;
        Ok(store_for(&vars, &[gradient]))
    };
    let (good, bad) = (of(1.0)?, of(f64::NAN)?);
    let loss = loss_with_gradients(&vars, &[tensor(&[1.0, 1.0], 2, candle_core::DType::F32)?])?;
    for in_place in [false, true] {
        let inner = Failing::new(vars.clone(), 0.1)?;
        let clip = Clip::norm(1.0).max_skips(2);
        let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip)?;
        assert!(opt.step_report(&bad)?.skipped()?);
        assert!(opt.step_report(&bad)?.skipped()?);
        opt.inner_mut().fails = true;
        let failed = if in_place {
            opt.backward_step_report(&loss)
        } else {
            opt.step_report(&good)
        };
        assert!(matches!(failed, Err(Error::Candle(_))));
        assert_eq!(
            (opt.steps_taken()?, opt.last_report().unwrap().step()),
            (0, 2)
        );
        let error = opt.step_report(&bad).unwrap_err();
        assert!(
            matches!(
                &error,
                Error::TooManySkips {
                    skips: 3,
                    max_skips: 2,
                    ..
                }
            ),
            "{error}"
        );
        opt.inner_mut().fails = false;
        opt.step_report(&good)?;
        assert!(opt.step_report(&bad)?.skipped()?, "the count starts again");
        assert_eq!(
            (opt.steps_taken()?, opt.last_report().unwrap().step()),
            (1, 4)
        );
    }
    Ok(())
}

/// Not skipped and not failed, around every optimizer.
#[test]
fn steps_taken_are_those_that_were_neither_skipped_nor_failed() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let vars = row.vars()?;
        let mut opt = row.clipped(&vars, Clip::norm(1.0))?;
        let bad = store_for(&vars, &bad_gradients(row, 0, f64::NAN)?);
        let good = store_for(&vars, &row.gradients(1)?);
        let other = tensor(&[1.0; 7], 7, candle_core::DType::F32)?;
        let unfit = store_for(&vars, &vec![other; vars.len()]);
        row.run(|| -> Result<()> {
            assert_eq!(opt.steps_taken()?, 0);
            let mut taken = 0;
            for step in 1..=12 {
                let (store, takes) = if step % 3 == 0 { (&bad, 0) } else { (&good, 1) };
                opt.step(store)?;
                taken += takes;
                assert!(opt.step(&unfit).is_err());
                assert_eq!(opt.steps_taken()?, taken, "{row}");
                assert_eq!(opt.last_report().unwrap().step(), step, "{row}");
            }
            Ok(())
        })
    }
    for_every_row!(promise);
    Ok(())
}

/// A checkpoint has the counter.
#[test]
fn steps_taken_are_counted_on() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let w = Var::from_tensor(&tensor(&[1.0, 2.0], 2, candle_core::DType::F32)?)?;
    let named = vec![("w".to_string(), w.clone())];
    let make = || {
        let inner = Sgd::from_named_vars(named.clone(), 0.1)?;
        ClippedOptimizer::wrap(inner, named.clone(), Clip::norm(1.0))
    };
    let of = |x: f64| -> Result<GradStore> {
        let gradient = tensor(&[x, 1.0], 2, candle_core::DType::F32)?;
        Ok(store_for(std::slice::from_ref(&w), &[gradient]))
    };
    let (good, bad) = (of(1.0)?, of(f64::NAN)?);
    let mut opt = make()?;
    for store in [&good, &bad, &good, &bad, &good] {
        opt.step(store)?;
    }
    opt.save(&path)?;
    let bytes = std::fs::read(&path)?;
    let resumed = |taken: u64| -> Result<_> {
        let file = edited(&bytes, |_, document| {
            let counter = &mut document["wrapper"]["steps_taken"];
            assert_eq!(*counter, 3);
            *counter = taken.into();
        })?;
        std::fs::write(&path, file)?;
        let mut opt = make()?;
        opt.step(&good)?;
        let loaded = opt.load(&path);
        Ok((loaded, opt))
    };
    for taken in [3, 5, 0] {
        let (loaded, mut opt) = resumed(taken)?;
        loaded?;
        assert_eq!(opt.steps_taken()?, taken);
        opt.step(&good)?;
        assert_eq!(
            (opt.steps_taken()?, opt.last_report().unwrap().step()),
            (taken + 1, 6)
        );
    }
    let (loaded, opt) = resumed(6)?;
    let error = loaded.unwrap_err().to_string();
    assert!(
        error.contains("steps_taken is 6, expected 5 at most"),
        "{error}"
    );
    assert_eq!(opt.steps_taken()?, 1, "nothing was changed");
    // A file of the inner optimizer alone says nothing of the wrapper.
    opt.inner().save(&path)?;
    let mut opt = make()?;
    opt.step(&good)?;
    opt.step(&bad)?;
    opt.load(&path)?;
    assert_eq!(opt.steps_taken()?, 1);
    Ok(())
}

/// Skipped steps, by the policy or by a rule, do not count for the bias correction.
#[test]
fn a_skipped_step_corrects_no_bias() -> Result<()> {
    let run = |stores: &[f64]| -> Result<_> {
        let w = Var::from_tensor(&tensor(&[1.0, 2.0], 2, candle_core::DType::F32)?)?;
        let named = vec![("w".to_string(), w.clone())];
        let inner = AdamW::from_named_vars(named.clone(), ParamsAdamW::default())?;
        let mut opt = ClippedOptimizer::wrap(inner, named, Clip::skip_above_norm(100.0))?;
        for x in stores {
            let gradient = tensor(&[*x, 1.0], 2, candle_core::DType::F32)?;
            opt.step(&store_for(std::slice::from_ref(&w), &[gradient]))?;
        }
        Ok((bits_of_vars(&[w])?, opt.inner().steps(), opt.steps_taken()?))
    };
    let right = run(&[0.5, 3.0])?;
    assert_eq!((right.1, right.2), (2, 2));
    assert_eq!(
        run(&[f64::NAN, 0.5, f64::INFINITY, 1000.0, f64::NAN, 3.0, -1e6])?,
        right
    );
    Ok(())
}
