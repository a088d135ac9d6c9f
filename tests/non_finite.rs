//! What a NaN or an infinite gradient does, for every row of the table and every policy.
#![allow(clippy::unwrap_used)]

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend::{self, Backend};
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{
    Clip, ClipGradNorm, ClippedOptimizer, Error, GradAccumulator, NonFinite, NormType, StepPath,
    StepReport, clip_grad_norm_with, clip_grad_value, total_norm,
};
use candle_nn::{Optimizer, ParamsAdamW};
use support::checkpoints::{Folder, edited};
use support::device::{backends, device};
use support::for_every_row;
use support::gradients::{
    all_values, all_values_of_vars, bits_of_gradients, bits_of_vars, gradients_of,
    loss_with_gradients, store_for, store_of, tensor, values,
};
use support::oracle::{self, assert_all_close};
use support::registry::Row;

/// The Var that gets the bad elements: not the first, so that an error has to look for it.
const BAD_VAR: usize = 1;

/// Gradients of a step with `bad` put into the second element of one of them.
fn bad_gradients<O: Optimizer + 'static>(row: &Row<O>, step: u64, bad: f64) -> Result<Vec<Tensor>> {
    let mut gradients = row.gradients(step)?;
    let mut elements = values(&gradients[BAD_VAR])?;
    elements[1] = bad;
    let old = &gradients[BAD_VAR];
    gradients[BAD_VAR] = tensor(&elements, old.shape(), old.dtype())?;
    Ok(gradients)
}

fn every_bad_value() -> [f64; 3] {
    [f64::NAN, f64::INFINITY, f64::NEG_INFINITY]
}

fn every_clip() -> [Clip; 3] {
    [Clip::none(), Clip::norm(1.0), Clip::value(0.5)]
}

/// Weights after a good step, whatever `between` does before it, and another one after that: the
/// second shows whether the moments were touched.
fn weights_around<O: Optimizer + 'static>(
    row: &Row<O>,
    clip: &Clip,
    between: impl Fn(&mut candle_grad_clip::ClippedOptimizer<O>, &[Var]) -> Result<()>,
) -> Result<Vec<Vec<u64>>> {
    let vars = row.vars()?;
    let mut opt = row.clipped(&vars, clip.clone())?;
    row.run(|| -> Result<()> {
        opt.step(&store_for(&vars, &row.gradients(0)?))?;
        let before = bits_of_vars(&vars)?;
        between(&mut opt, &vars)?;
        assert_eq!(bits_of_vars(&vars)?, before, "{row}, {clip}: weights");
        opt.step(&store_for(&vars, &row.gradients(1)?))?;
        opt.step(&store_for(&vars, &row.gradients(2)?))?;
        Ok(())
    })?;
    Ok(bits_of_vars(&vars)?)
}

#[test]
fn error_names_the_var_and_leaves_everything() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        for clip in every_clip() {
            let clip = clip.non_finite(NonFinite::Error);
            let clean = weights_around(row, &clip, |_, _| Ok(()))?;
            for bad in every_bad_value() {
                let with_bad = weights_around(row, &clip, |opt, vars| {
                    let gradients = bad_gradients(row, 3, bad)?;
                    let store = store_for(vars, &gradients);
                    let before = bits_of_gradients(&store, vars)?;
                    let steps = opt.last_report().unwrap().step();

                    let error = opt.step_report(&store).unwrap_err();
                    let (nans, infinities) = (u64::from(bad.is_nan()), u64::from(!bad.is_nan()));
                    assert!(
                        matches!(
                            &error,
                            Error::NonFinite { var, nan, infinite, elements: 3, total: 1, .. }
                                if var == "var.1" && (*nan, *infinite) == (nans, infinities)
                        ),
                        "{row}, {clip}: {error:?}"
                    );
                    let loss = loss_with_gradients(vars, &gradients)?;
                    let from_backward = opt.backward_step(&loss).unwrap_err().to_string();
                    assert!(
                        from_backward.starts_with(&error.to_string()),
                        "{from_backward}"
                    );

                    assert_eq!(bits_of_gradients(&store, vars)?, before, "{row}, {clip}");
                    assert_eq!(opt.last_report().unwrap().step(), steps, "{row}, {clip}");
                    Ok(())
                })?;
                assert_eq!(with_bad, clean, "{row}, {clip}, {bad}: moments");
            }
        }
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn skip_step_reports_and_leaves_everything() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        for clip in every_clip() {
            let clean = weights_around(row, &clip, |_, _| Ok(()))?;
            for bad in every_bad_value() {
                let with_bad = weights_around(row, &clip, |opt, vars| {
                    let gradients = bad_gradients(row, 3, bad)?;
                    let store = store_for(vars, &gradients);
                    let before = bits_of_gradients(&store, vars)?;
                    let loss = loss_with_gradients(vars, &gradients)?;
                    for report in [opt.step_report(&store)?, opt.backward_step_report(&loss)?] {
                        let record = report.to_record()?;
                        assert!(record.skipped && !record.was_clipped, "{row}, {clip}");
                        assert_eq!(record.path, StepPath::Skipped);
                        assert_eq!((record.clip_coef, record.clipped_norm), (0.0, 0.0));
                        assert_eq!(record.non_finite, 1, "{row}, {clip}");
                        assert_eq!(record.total_norm.is_nan(), bad.is_nan(), "{row}, {clip}");
                        assert!(!record.total_norm.is_finite(), "{row}, {clip}");
                    }
                    assert_eq!(opt.last_report().unwrap().step(), 3, "skipped steps count");
                    assert_eq!(bits_of_gradients(&store, vars)?, before, "{row}, {clip}");
                    Ok(())
                })?;
                assert_eq!(with_bad, clean, "{row}, {clip}, {bad}: moments");
            }
        }
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

/// A step that is one skip too many: where a GPU decides, the next step notices it.
fn last_of_many<O: Optimizer + 'static>(
    opt: &mut ClippedOptimizer<O>,
    bad: &GradStore,
) -> candle_grad_clip::Result<StepReport> {
    let report = opt.step_report(bad)?;
    if device().is_cuda() && report.path() == StepPath::Fused {
        report.skipped()?; // its result is here now
        return opt.step_report(bad);
    }
    Ok(report)
}

#[test]
fn too_many_skips_in_a_row_are_an_error_and_a_good_step_forgives() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let vars = row.vars()?;
        let mut opt = row.clipped(&vars, Clip::norm(1.0).max_skips(2))?;
        let bad = store_for(&vars, &bad_gradients(row, 0, f64::NAN)?);
        let good = store_for(&vars, &row.gradients(1)?);
        row.run(|| -> Result<()> {
            for _ in 0..3 {
                assert!(opt.step_report(&bad)?.skipped()?, "{row}");
                assert!(opt.step_report(&bad)?.skipped()?, "{row}");
                assert!(!opt.step_report(&good)?.skipped()?, "{row}");
            }
            let before = bits_of_vars(&vars)?;
            opt.step(&bad)?;
            opt.step(&bad)?;
            let error = last_of_many(&mut opt, &bad).unwrap_err();
            assert!(
                matches!(&error, Error::TooManySkips { skips: 3, max_skips: 2, var } if var == "var.1"),
                "{row}: {error:?}"
            );
            assert_eq!(bits_of_vars(&vars)?, before, "{row}");
            opt.step(&good)?;
            assert_ne!(bits_of_vars(&vars)?, before, "{row}: training can go on");
            assert!(opt.step_report(&bad)?.skipped()?, "{row}: the count starts again");
            Ok(())
        })
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn no_skip_allowed_means_the_first_is_an_error() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let vars = row.vars()?;
        let mut opt = row.clipped(&vars, Clip::norm(1.0).max_skips(0))?;
        let bad = store_for(&vars, &bad_gradients(row, 0, f64::NAN)?);
        let error = row.run(|| last_of_many(&mut opt, &bad)).unwrap_err();
        assert!(
            matches!(
                error,
                Error::TooManySkips {
                    skips: 1,
                    max_skips: 0,
                    ..
                }
            ),
            "{row}"
        );
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn zero_is_the_step_with_zeros_in_their_place() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        for clip in every_clip() {
            let clip = clip.non_finite(NonFinite::Zero);
            let zeroed = row.vars()?;
            let mut opt = row.clipped(&zeroed, clip.clone())?;
            let right = row.run(|| {
                opt.step_report(&store_for(&zeroed, &bad_gradients(row, 1, 0.0)?))
                    .map_err(anyhow::Error::from)
            })?;
            for bad in every_bad_value() {
                let vars = row.vars()?;
                let gradients = bad_gradients(row, 1, bad)?;
                let mut opt = row.clipped(&vars, clip.clone())?;
                let report = row.run(|| opt.step_report(&store_for(&vars, &gradients)))?;
                let what = format!("{row}, {clip}, {bad}");
                assert_eq!(bits_of_vars(&vars)?, bits_of_vars(&zeroed)?, "{what}");
                assert_eq!(report.non_finite()?, 1, "{what}");
                assert_eq!(report.total_norm()?, right.total_norm()?, "{what}");
                assert_eq!(report.clip_coef()?, right.clip_coef()?, "{what}");
                assert_eq!(report.clipped_norm()?, right.clipped_norm()?, "{what}");
                assert_eq!(report.num_clipped()?, right.num_clipped()?, "{what}");
                assert_eq!(report.was_clipped()?, right.was_clipped()?, "{what}");

                let in_place = row.vars()?;
                let mut opt = row.clipped(&in_place, clip.clone())?;
                let loss = loss_with_gradients(&in_place, &gradients)?;
                row.run(|| opt.backward_step(&loss))?;
                assert_eq!(bits_of_vars(&in_place)?, bits_of_vars(&zeroed)?, "{what}");
            }
        }
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn propagate_is_the_inner_optimizer_with_what_pytorch_would_give_it() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        for clip in every_clip() {
            for bad in every_bad_value() {
                let what = format!("{row}, {clip}, {bad}");
                let gradients = bad_gradients(row, 1, bad)?;
                let by_hand = pytorch(&gradients, &clip)?;

                let vars = row.vars()?;
                let mut opt = row.clipped(&vars, clip.clone().non_finite(NonFinite::Propagate))?;
                row.run(|| opt.step(&store_for(&vars, &gradients)))?;
                let right = row.vars()?;
                row.bare(&right)?.step(&store_for(&right, &by_hand))?;
                let (ours, right) = (all_values_of_vars(&vars)?, all_values_of_vars(&right)?);
                assert_same(&ours, &right, row.tolerance(), &what);
            }
        }
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

/// `clip_grad_norm_` and `clip_grad_value_` with their defaults, by the plain equations.
fn pytorch(gradients: &[Tensor], clip: &Clip) -> Result<Vec<Tensor>> {
    let all = all_values(gradients)?;
    let coef = oracle::clip_coef(oracle::norm(&all, 2.0), 1.0, 1e-6);
    let name = clip.to_string();
    let edit = |x: f64| match name.as_str() {
        "norm:1" => x * coef,
        "value:0.5" => x.clamp(-0.5, 0.5),
        _ => x,
    };
    let edited = |gradient: &Tensor| -> Result<Tensor> {
        let elements: Vec<f64> = values(gradient)?.into_iter().map(edit).collect();
        Ok(tensor(&elements, gradient.shape(), gradient.dtype())?)
    };
    gradients.iter().map(edited).collect()
}

/// As [`assert_all_close`], with NaN and infinities in the same places.
#[track_caller]
fn assert_same(ours: &[f64], right: &[f64], tolerance: f64, what: &str) {
    let special = |values: &[f64]| -> Vec<String> {
        let finite = |x: &f64| if x.is_finite() { 0.0 } else { *x };
        values.iter().map(|x| finite(x).to_string()).collect()
    };
    assert_eq!(special(ours), special(right), "{what}: NaN and infinities");
    let finite =
        |values: &[f64]| -> Vec<f64> { values.iter().copied().filter(|x| x.is_finite()).collect() };
    assert_all_close(&finite(ours), &finite(right), tolerance, what);
}

/// Gradients of every size that f32 has, whose squares it does not.
fn sizes_of_f32() -> [f64; 8] {
    [1.5e-45, 1e-40, 1.2e-38, 1e-20, 1.0, 1e20, 8.5e37, 3.4e38]
}

#[test]
fn gradients_at_the_ends_of_f32_are_measured_and_clipped_by_candles_operations() -> Result<()> {
    for size in sizes_of_f32() {
        for n in [1, 3, 1024, 1025, 5000] {
            let gradient = tensor(&vec![-size; n], n, DType::F32)?;
            let exact = values(&gradient)?;
            for p in [0.5, 1.0, 2.0, 3.0, f64::INFINITY] {
                let what = format!("{n} of {size:e}, {p}-norm");
                let (vars, mut store) = store_of(std::slice::from_ref(&gradient))?;
                let right = oracle::norm(&exact, p);
                let norm = backend::with_backend(Backend::CandleOps, || {
                    total_norm(&store, &vars, NormType::from(p))
                })?;
                oracle::assert_close(norm, right, 2e-6, &what);
                let options = ClipGradNorm {
                    max_norm: 1.0,
                    norm_type: NormType::from(p),
                    ..ClipGradNorm::default()
                };
                backend::with_backend(Backend::CandleOps, || {
                    clip_grad_norm_with(&mut store, &vars, &options)
                })?;
                let clipped = values(&gradients_of(&store, &vars)?[0])?;
                let coef = oracle::clip_coef(right, 1.0, 1e-6);
                oracle::assert_close(clipped[0], exact[0] * coef, 1e-5, &what);
            }
        }
    }
    Ok(())
}

/// One NaN among many elements, in the middle of a row and in the rest behind the rows.
#[test]
fn candles_operations_count_zero_and_keep_every_bad_value() -> Result<()> {
    for (n, place) in [(1, 0), (700, 3), (3000, 1500), (3000, 2999)] {
        for bad in every_bad_value() {
            for other in [0.25, 8.5e37] {
                let mut elements = vec![other; n];
                elements[place] = bad;
                let gradient = tensor(&elements, n, DType::F32)?;
                let what = format!("{bad} at {place} of {n}, others {other}");
                let (vars, mut store) = store_of(std::slice::from_ref(&gradient))?;
                for p in [1.0, 2.0, 3.0, f64::INFINITY] {
                    let options = ClipGradNorm {
                        norm_type: NormType::from(p),
                        ..ClipGradNorm::default()
                    };
                    store.insert(&vars[0], gradient.clone());
                    let error = backend::with_backend(Backend::CandleOps, || {
                        clip_grad_norm_with(&mut store, &vars, &options)
                    })
                    .unwrap_err();
                    let is_right = matches!(&error, Error::NonFinite { nan, infinite, .. }
                        if (*nan, *infinite) == if bad.is_nan() { (1, 0) } else { (0, 1) });
                    assert!(is_right, "{what}, {p}-norm: {error:?}");
                    let options = ClipGradNorm {
                        non_finite: NonFinite::Zero,
                        ..options
                    };
                    backend::with_backend(Backend::CandleOps, || {
                        clip_grad_norm_with(&mut store, &vars, &options)
                    })?;
                    let zeroed = values(&gradients_of(&store, &vars)?[0])?;
                    assert_eq!(zeroed[place], 0.0, "{what}, {p}-norm");
                    assert!(zeroed.iter().all(|x| x.is_finite()), "{what}, {p}-norm");
                }
                store.insert(&vars[0], gradient.clone());
                backend::with_backend(Backend::CandleOps, || {
                    clip_grad_value(&mut store, &vars, 0.5)
                })?;
                let clamped = values(&gradients_of(&store, &vars)?[0])?;
                let right = bad.clamp(-0.5, 0.5);
                let same = clamped[place].to_bits() == right.to_bits();
                assert!(same || clamped[place].is_nan() && bad.is_nan(), "{what}");
            }
        }
    }
    Ok(())
}

/// Fast math lets a compiler take every comparison with a NaN as it likes: none may decide.
#[test]
fn candle_ops_ask_no_device_whether_a_value_is_finite() {
    let sources = [
        include_str!("../crates/candle-grad-clip/src/backend/candle_ops/edit.rs"),
        include_str!("../crates/candle-grad-clip/src/backend/candle_ops/measure.rs"),
        include_str!("../crates/candle-grad-clip/src/backend/candle_ops/powers.rs"),
        include_str!("../crates/candle-grad-clip/src/backend/candle_ops/tensor_ops.rs"),
        include_str!("../crates/candle-grad-clip/src/backend/candle_ops/units.rs"),
    ];
    let calls = |name: &str| -> usize { sources.iter().map(|s| s.matches(name).count()).sum() };
    for name in [
        ".ne(",
        ".eq(",
        ".le(",
        ".lt(",
        ".ge(",
        ".where_cond(",
        "broadcast_div(",
        ".copy()",
    ] {
        assert_eq!(calls(name), 0, "{name}");
    }
    assert_eq!(
        calls(".gt("),
        1,
        "the count of clamped elements, used if all are finite"
    );
}

fn is_minus_zero(x: f64) -> bool {
    x == 0.0 && x.is_sign_negative()
}

#[test]
fn minus_zero_keeps_its_sign_on_every_backend() -> Result<()> {
    for backend in backends() {
        let gradient = tensor(&[-0.0, 3.0, 4.0], 3, DType::F32)?;
        let (vars, mut store) = store_of(std::slice::from_ref(&gradient))?;
        let mut sum = GradAccumulator::mean(vars.clone());
        let first_of_mean = backend::with_backend(backend, || -> Result<f64> {
            clip_grad_norm_with(&mut store, &vars, &ClipGradNorm::default())?;
            sum.add(&store)?;
            sum.add(&store)?;
            let mean = sum.finish()?.unwrap();
            Ok(values(&gradients_of(mean, &vars)?[0])?[0])
        })?;
        let clipped = values(&gradients_of(&store, &vars)?[0])?[0];
        assert!(is_minus_zero(clipped), "{backend:?}: clipped");
        assert!(is_minus_zero(first_of_mean), "{backend:?}: a mean");

        let w = Var::from_tensor(&tensor(&[-0.0, 1.0, 1.0], 3, DType::F32)?)?;
        let params = ParamsAdamW {
            lr: 0.1,
            weight_decay: 0.1,
            ..ParamsAdamW::default()
        };
        let adamw = AdamW::new(vec![w.clone()], params)?;
        let mut opt = ClippedOptimizer::wrap(adamw, vec![w.clone()], Clip::norm(1.0))?;
        let zero = tensor(&[0.0, 1.0, 1.0], 3, DType::F32)?;
        backend::with_backend(backend, || {
            opt.step(&store_for(std::slice::from_ref(&w), &[zero]))
        })?;
        assert!(
            is_minus_zero(values(w.as_tensor())?[0]),
            "{backend:?}: a weight"
        );
    }
    Ok(())
}

/// The two walks that have not measured what they edit: sums of micro-batches, and an optimizer with more Vars than are clipped.
#[test]
fn zero_reaches_what_was_not_measured_before() -> Result<()> {
    for backend in backends() {
        let bad = tensor(&[1.0, f64::NAN, f64::INFINITY], 3, DType::F32)?;
        let (vars, store) = store_of(std::slice::from_ref(&bad))?;
        let mut sum = GradAccumulator::mean(vars.clone()).non_finite(NonFinite::Zero);
        let mean = backend::with_backend(backend, || -> Result<Vec<f64>> {
            sum.add(&store)?;
            Ok(values(&gradients_of(sum.finish()?.unwrap(), &vars)?[0])?)
        })?;
        assert_eq!(mean, [1.0, 0.0, 0.0], "{backend:?}: a mean");

        let train = |clip: Clip, gradient: &Tensor| -> Result<Vec<f64>> {
            let zeros = tensor(&[0.0; 3], 3, DType::F32)?;
            let vars = [Var::from_tensor(&zeros)?, Var::from_tensor(&zeros)?];
            let sgd = Sgd::new(vars.to_vec(), ParamsSgd::from(1.0))?;
            let clipped = vec![vars[1].clone()];
            let mut opt = ClippedOptimizer::wrap_allow_unclipped(sgd, clipped, clip, &["*"])?;
            let store = store_for(&vars, &[zeros, gradient.clone()]);
            backend::with_backend(backend, || opt.step(&store))?;
            Ok(values(vars[1].as_tensor())?)
        };
        let stepped = train(Clip::norm(10.0).non_finite(NonFinite::Zero), &bad)?;
        assert_eq!(stepped, [-1.0, 0.0, 0.0], "{backend:?}: a step");
        let stepped = train(Clip::value(0.5).non_finite(NonFinite::Propagate), &bad)?;
        assert_eq!(
            (stepped[0], stepped[2]),
            (-0.5, -0.5),
            "{backend:?}: a step"
        );
        assert!(stepped[1].is_nan(), "{backend:?}: a NaN is not the bound");
    }
    Ok(())
}

/// candle's SGD, but for the steps that fail.
struct Failing {
    sgd: candle_nn::SGD,
    fails: bool,
}

impl Optimizer for Failing {
    type Config = f64;

    fn new(vars: Vec<Var>, lr: f64) -> candle_core::Result<Self> {
        let sgd = candle_nn::SGD::new(vars, lr)?;
        Ok(Self { sgd, fails: false })
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        if self.fails {
            candle_core::bail!("the inner step failed");
        }
        self.sgd.step(grads)
    }

    fn learning_rate(&self) -> f64 {
        self.sgd.learning_rate()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.sgd.set_learning_rate(lr);
    }
}

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

/// A checkpoint has the counter; an older file is read as if the optimizer had always been wrapped.
#[test]
fn steps_taken_are_counted_on() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let w = Var::from_tensor(&tensor(&[1.0, 2.0], 2, candle_core::DType::F32)?)?;
    let named = vec![("w".to_string(), w.clone())];
    let make = || {
        ClippedOptimizer::wrap(
            Sgd::named(named.clone(), 0.1)?,
            named.clone(),
            Clip::norm(1.0),
        )
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
    let resumed = |taken: Option<u64>| -> Result<_> {
        let file = edited(&bytes, |_, document| {
            let wrapper = document["wrapper"].as_object_mut().unwrap();
            assert_eq!(wrapper.remove("steps_taken"), Some(3.into()));
            if let Some(taken) = taken {
                wrapper.insert("steps_taken".to_string(), taken.into());
            }
        })?;
        std::fs::write(&path, file)?;
        let mut opt = make()?;
        opt.step(&good)?;
        let loaded = opt.load(&path);
        Ok((loaded, opt))
    };
    for (taken, right) in [(Some(3), 3), (Some(5), 5), (Some(0), 0), (None, 3)] {
        let (loaded, mut opt) = resumed(taken)?;
        loaded?;
        assert_eq!(opt.steps_taken()?, right);
        opt.step(&good)?;
        assert_eq!(
            (opt.steps_taken()?, opt.last_report().unwrap().step()),
            (right + 1, 6)
        );
    }
    let (loaded, opt) = resumed(Some(6))?;
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
        let inner = AdamW::named(named.clone(), ParamsAdamW::default())?;
        let mut opt = ClippedOptimizer::wrap(inner, named, Clip::skip_norm(100.0))?;
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
