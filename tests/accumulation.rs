//! Micro-batches added up are the big batch: to rounding, for any number of threads, with missing and bad gradients.
#![allow(clippy::unwrap_used)]

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{
    Clip, ClippedOptimizer, Error, GradAccumulator, NamedVars, NonFinite, backend, clip_grad_norm,
};
use candle_nn::{Linear, Module, Optimizer, VarBuilder, VarMap};
use support::device::{backends, device};
use support::gradients::{
    all_values, bits_of_gradients, bits_of_vars, gradients_of, random_values, store_for, store_of,
    tensor, values,
};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn on_every_backend(body: impl Fn() -> Result<()>) -> Result<()> {
    backends().into_iter().try_for_each(|backend| {
        backend::with_backend(backend, &body).map_err(|e| e.context(format!("{backend:?}")))
    })
}

/// A net of two layers, its weights set to the same values each time.
struct Net {
    map: VarMap,
    hidden: Linear,
    head: Linear,
}

impl Net {
    fn new(dtype: DType) -> Result<Self> {
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, dtype, device());
        let hidden = candle_nn::linear(3, 16, vb.pp("hidden"))?;
        let head = candle_nn::linear(16, 1, vb.pp("head"))?;
        for (i, var) in NamedVars::from(&map).vars().iter().enumerate() {
            let values = random_values(var.elem_count(), i as u64);
            var.set(&(tensor(&values, var.shape(), dtype)? * 0.5)?)?;
        }
        Ok(Self { map, hidden, head })
    }

    /// Mean squared error over the rows of `x`.
    fn loss(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.sum_keepdim(1)?;
        let hidden = self.hidden.forward(x)?.tanh()?;
        Ok((self.head.forward(&hidden)? - y)?.sqr()?.mean_all()?)
    }
}

fn batch(dtype: DType) -> Result<Tensor> {
    Ok(tensor(&random_values(24 * 3, 99), (24, 3), dtype)?)
}

fn assert_close(ours: &[f64], right: &[f64], tolerance: f64, what: &str) {
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
            let (net, x) = (Net::new(dtype)?, batch(dtype)?);
            let vars = NamedVars::from(&net.map);
            let whole = net.loss(&x)?.backward()?;
            let whole = all_values(&gradients_of(&whole, vars.vars())?)?;
            for k in [1, 2, 3, 8] {
                let mut mean = GradAccumulator::mean(vars.clone());
                let mut sum = GradAccumulator::sum(vars.clone());
                for _round in 0..2 {
                    for part in x.chunk(k, 0)? {
                        mean.add(&net.loss(&part)?.backward()?)?;
                        sum.add(&(net.loss(&part)? / k as f64)?.backward()?)?;
                    }
                    assert_eq!(mean.micro_batches(), k as u64);
                    for (what, accumulator) in [("mean", &mut mean), ("sum", &mut sum)] {
                        let grads = accumulator.finish()?.unwrap();
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
        let (net, x) = (Net::new(DType::F64)?, batch(DType::F64)?);
        let sgd = Sgd::named(&net.map, 0.1)?;
        let mut opt = ClippedOptimizer::wrap(sgd, &net.map, Clip::norm(0.5))?;
        let mut accumulator = GradAccumulator::mean(&net.map);
        let mut norms = Vec::new();
        for _ in 0..20 {
            for part in x.chunk(k, 0)? {
                accumulator.add(&net.loss(&part)?.backward()?)?;
            }
            let report = opt.step_report(accumulator.finish()?.unwrap())?;
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
        let grads = accumulator.finish()?.unwrap();
        let norm = clip_grad_norm(grads, &vars, 1.0)?;
        assert!((norm - 8f64.sqrt()).abs() < 1e-12);
        let once = all_values(&gradients_of(grads, &vars)?)?;
        assert_close(&once, &[0.5f64.sqrt(); 2], 1e-6, "once");
        let each = all_values(&gradients_of(each.finish()?.unwrap(), &vars)?)?;
        assert_close(&each, &[1.0; 2], 1e-6, "each");
        Ok(())
    })
}

/// Small, empty, scalar, and more than one block, in all dtypes.
fn gradients(seed: u64) -> Result<Vec<Tensor>> {
    let shapes: [&[usize]; 5] = [&[7, 5], &[], &[0, 3], &[200_003], &[1025]];
    let mut all = Vec::new();
    for (i, shape) in shapes.into_iter().enumerate() {
        for dtype in DTYPES {
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
        let grads = accumulator.finish()?.unwrap();
        Ok(bits_of_gradients(grads, &vars)?)
    };
    let first = run()?;
    for threads in [1, 2, 3, 8] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()?;
        assert!(pool.install(run)? == first, "{threads} threads");
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
            let grads = accumulator.finish()?.unwrap();
            let grad = grads.get(&vars[0]).unwrap();
            assert_eq!(grad.dtype(), dtype);
            assert_close(&values(grad)?, &[right], 1e-2, "mean");
        }
        let (vars, store) = store_of(&[tensor(&[60000.0], 1, DType::F16)?])?;
        let mut sum = GradAccumulator::sum(vars.clone());
        sum.add(&store)?;
        sum.add(&store)?;
        let grads = sum.finish()?.unwrap();
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
        let sgd = Sgd::named(named.clone(), 1.0)?;
        let mut opt = ClippedOptimizer::wrap(sgd, named, Clip::none())?;
        for _round in 0..2 {
            let mut first = GradStore::default();
            first.insert(&vars[0], one(2.0)?);
            first.insert(&vars[2], one(8.0)?);
            let mut second = GradStore::default();
            second.insert(&vars[0], one(4.0)?);
            second.insert(&vars[1], one(6.0)?);
            accumulator.add(&first)?;
            accumulator.add(&second)?;
            let grads = accumulator.finish()?.unwrap();
            assert_eq!(values(grads.get(&vars[0]).unwrap())?, [3.0]);
            assert_eq!(values(grads.get(&vars[1]).unwrap())?, [3.0]);
            assert_eq!(values(grads.get(&vars[2]).unwrap())?, [4.0]);
            assert!(grads.get(&vars[3]).is_none());
            assert_eq!(opt.step_report(grads)?.missing(), ["never"]);
        }
        Ok(())
    })
}

#[test]
fn a_bad_micro_batch_is_treated_as_the_policy_says() -> Result<()> {
    on_every_backend(|| {
        for dtype in DTYPES {
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
                let grads = accumulator.finish()?.unwrap();
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
fn no_micro_batch_is_no_step() -> Result<()> {
    let bad = tensor(&[f64::NAN], 1, DType::F32)?;
    let (vars, store) = store_of(&[bad])?;
    let mut accumulator = GradAccumulator::mean(vars).non_finite(NonFinite::SkipStep);
    assert!(accumulator.finish()?.is_none());
    accumulator.add(&store)?;
    assert!(accumulator.finish()?.is_none(), "all were dropped");
    assert_eq!(accumulator.dropped(), 1);
    Ok(())
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
        let grads = accumulator.finish()?.unwrap();
        let left = all_values(&gradients_of(grads, &vars)?)?;
        assert_eq!(left, [1.0, 2.0, 1.0, 2.0]);
        Ok(())
    })
}

/// Broadcast and transposed gradients, one that is a Var, one shared by two Vars, and one of the accumulator's own buffers.
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
            let grads = accumulator.finish()?.unwrap();
            taken = gradients_of(grads, &vars)?;
            for (ours, gradient) in taken.iter().zip(&gradients) {
                let twice: Vec<f64> = values(gradient)?.iter().map(|x| 2.0 * x).collect();
                assert_eq!(values(ours)?, twice);
            }
            // The first sum is the caller's gradient, or what it lent: edited, it must not change that.
            clip_grad_norm(grads, &vars, 0.1)?;
            assert_eq!(bits_of_gradients(&store, &vars)?, before);
        }
        accumulator.add(&store)?;
        accumulator.add(&store_for(&vars, &taken))?; // whose storage is the sum's
        accumulator.finish()?;
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
        let grads = accumulator.finish()?.unwrap();
        assert_eq!(bits_of_gradients(grads, &vars)?, before);
        clip_grad_norm(grads, &vars, 0.1)?;
        assert_eq!(bits_of_gradients(&store, &vars)?, before);
        assert!(bits_of_vars(&vars)?.iter().flatten().all(|bits| *bits == 0));
        Ok(())
    })
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
            let grads = accumulator.finish()?.unwrap();
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
            let (net, x) = (Net::new(dtype)?, batch(dtype)?);
            let vars = NamedVars::from(&net.map);
            let whole = net.loss(&x)?.backward()?;
            let whole = all_values(&gradients_of(&whole, vars.vars())?)?;
            let mut mean = GradAccumulator::mean(vars.clone());
            let mut sum = GradAccumulator::sum(vars.clone());
            for _round in 0..2 {
                for (start, rows) in [(0, 5), (5, 1), (6, 18)] {
                    let grads = net.loss(&x.narrow(0, start, rows)?)?.backward()?;
                    mean.add_weighted(&grads, rows as f64)?;
                    sum.add_weighted(&grads, rows as f64 / 24.0)?;
                }
                for (what, accumulator) in [("mean", &mut mean), ("sum", &mut sum)] {
                    let grads = accumulator.finish()?.unwrap();
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
            Ok(bits_of_gradients(accumulator.finish()?.unwrap(), &vars)?)
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
            let grads = accumulator.finish()?.unwrap();
            assert_eq!(values(grads.get(&vars[0]).unwrap())?, [2.0]);
            accumulator.add_weighted(&store, 0.0)?;
            assert!(
                accumulator.finish()?.is_none(),
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
            assert!(accumulator.finish()?.is_none());
            assert!(accumulator.finish()?.is_none(), "no window");
        }
        accumulator.add(&bad)?;
        accumulator.add(&good)?;
        assert!(accumulator.finish()?.is_some(), "the count starts again");
    }
    for _ in 0..2 {
        accumulator.add(&bad)?;
        assert!(accumulator.finish()?.is_none());
    }
    accumulator.add(&bad)?;
    let error = accumulator.finish().map(drop).unwrap_err();
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
        assert_eq!(accumulator.finish().is_err(), window == 11);
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
        accumulator.add(&GradStore::default())?; // nothing at all: all gradients are 0
        assert_eq!(accumulator.micro_batches(), 2);
        let grads = accumulator.finish()?.unwrap();
        assert_eq!(values(grads.get(&vars[0]).unwrap())?, [0.5]);
    }
    Ok(())
}

/// The optimizer's Vars that the accumulator was not given are told by name.
#[test]
fn a_step_names_the_vars_that_the_accumulator_lacks() -> Result<()> {
    let net = Net::new(DType::F32)?;
    let all = NamedVars::from(&net.map);
    let named = all.names().iter().cloned().zip(all.vars().iter().cloned());
    let (head, hidden): (Vec<_>, Vec<_>) = named.partition(|(name, _)| name.starts_with("head"));
    let mut accumulator = GradAccumulator::mean(head);
    let sgd = Sgd::named(&net.map, 0.1)?;
    let mut opt = ClippedOptimizer::wrap(sgd, &net.map, Clip::norm(1.0))?;
    accumulator.add(&net.loss(&batch(DType::F32)?)?.backward()?)?;
    let report = opt.step_report(accumulator.finish()?.unwrap())?;
    let names: Vec<String> = hidden.into_iter().map(|(name, _)| name).collect();
    assert_eq!(report.missing(), names);
    Ok(())
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
        assert!(opt.step_report(sum.finish()?.unwrap())?.skipped()?);
        assert_eq!(bits_of_vars(&vars)?, before);
        Ok(())
    })
}
