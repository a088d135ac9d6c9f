//! Promises that hold for every row of the table (optimizer x dtype x backend).

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{
    Clip, ClipGradNorm, ClippedConfig, ClippedOptimizer, Error, LossScaler, NonFinite, NormType,
    SkipReason, StepPath, clip_by_global_norm, clip_grad_norm, clip_grad_norm_with,
    clip_grad_value, clip_grads_with_norm, total_norm,
};
use candle_nn::{Optimizer, SGD};
use support::for_every_row;
use support::gradients::{
    all_values, all_values_of_vars, bits_of_gradients, bits_of_vars, loss_with_gradients,
    store_for, values,
};
use support::oracle::{self, assert_all_close_above};
use support::registry::Row;

const STEPS: u64 = 4;

/// Trains without clipping.
fn train_bare<O: Optimizer + 'static>(row: &Row<O>) -> Result<Vec<Var>> {
    let vars = row.vars()?;
    let mut opt = row.bare(&vars)?;
    for step in 0..STEPS {
        opt.step(&store_for(&vars, &row.gradients(step)?))?;
    }
    Ok(vars)
}

/// Trains with clipping, through `step` or `backward_step`.
fn train<O: Optimizer + 'static>(row: &Row<O>, clip: &Clip, backward: bool) -> Result<Vec<Var>> {
    let vars = row.vars()?;
    let mut opt = row.clipped(&vars, clip.clone())?;
    for step in 0..STEPS {
        let gradients = row.gradients(step)?;
        row.run(|| -> Result<()> {
            if backward {
                opt.backward_step(&loss_with_gradients(&vars, &gradients)?)?;
            } else {
                opt.step(&store_for(&vars, &gradients))?;
            }
            Ok(())
        })?;
    }
    Ok(vars)
}

/// Trains the inner optimizer on gradients that `scale` has edited, by the plain equations.
fn train_by_hand<O: Optimizer + 'static>(
    row: &Row<O>,
    edit: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<Vec<Var>> {
    let vars = row.vars()?;
    let mut opt = row.bare(&vars)?;
    for step in 0..STEPS {
        opt.step(&store_for(&vars, &edit(&row.gradients(step)?)?))?;
    }
    Ok(vars)
}

/// Applies `f` to every element in f64 and rounds back.
fn map(gradients: &[Tensor], f: impl Fn(f64) -> f64) -> Result<Vec<Tensor>> {
    let edit = |gradient: &Tensor| -> Result<Tensor> {
        let edited: Vec<f64> = values(gradient)?.into_iter().map(&f).collect();
        Ok(support::gradients::tensor(
            &edited,
            gradient.shape(),
            gradient.dtype(),
        )?)
    };
    gradients.iter().map(edit).collect()
}

#[test]
fn a_limit_that_is_not_reached_changes_no_bit() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let bare = bits_of_vars(&train_bare(row)?)?;
        for clip in [
            Clip::none(),
            Clip::norm(1e4),
            Clip::norm(f64::INFINITY),
            Clip::norm(1e4).norm_type(NormType::L1),
            Clip::value(1e4),
            Clip::value(f64::INFINITY),
            Clip::param_norm(1e4),
            Clip::block_rms(1e4),
            Clip::skip_norm(1e4),
        ] {
            for backward in [false, true] {
                let clipped = bits_of_vars(&train(row, &clip, backward)?)?;
                assert_eq!(clipped, bare, "{row}, {clip}, backward_step: {backward}");
            }
        }
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn a_norm_limit_that_is_passed_is_the_inner_optimizer_with_scaled_gradients() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let bare = all_values_of_vars(&train_bare(row)?)?;
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.0)] {
            let max_norm = 2.0;
            let by_hand = train_by_hand(row, |gradients| {
                let total_norm = oracle::norm(&all_values(gradients)?, norm_type.p());
                let clip_coef = oracle::clip_coef(total_norm, max_norm, 1e-6);
                map(gradients, |x| x * clip_coef)
            })?;
            let by_hand = all_values_of_vars(&by_hand)?;
            let clip = Clip::norm(max_norm).norm_type(norm_type);
            for backward in [false, true] {
                let what = format!("{row}, {norm_type}-norm, backward_step: {backward}");
                let ours = all_values_of_vars(&train(row, &clip, backward)?)?;
                // Steps of 0.25 take weights of 0.25 to 1.25 past 0: what is left there keeps the
                // roundings of both.
                let (tolerance, floor) = (row.tolerance(), 0.25 * row.tolerance());
                assert_all_close_above(&ours, &by_hand, tolerance, floor, &what);
                assert_differ(&ours, &bare, 4.0 * row.tolerance(), &what);
            }
        }
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

/// What the case must show: that clipping made a difference.
#[track_caller]
fn assert_differ(x: &[f64], y: &[f64], tolerance: f64, what: &str) {
    let largest = x.iter().zip(y).map(|(x, y)| (x - y).abs());
    assert!(largest.fold(0.0, f64::max) > tolerance, "{what}: no effect");
}

#[test]
fn a_value_limit_is_the_inner_optimizer_with_clamped_gradients() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let bare = all_values_of_vars(&train_bare(row)?)?;
        let by_hand = train_by_hand(row, |gradients| map(gradients, |x| x.clamp(-0.5, 0.5)))?;
        let by_hand = bits_of_vars(&by_hand)?;
        for backward in [false, true] {
            let vars = train(row, &Clip::value(0.5), backward)?;
            let what = format!("{row}, backward_step: {backward}");
            assert_eq!(bits_of_vars(&vars)?, by_hand, "{what}");
            assert_differ(&all_values_of_vars(&vars)?, &bare, row.tolerance(), &what);
        }
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn step_never_changes_the_callers_gradients() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let clips = [
            Clip::norm(0.5),
            Clip::value(0.5),
            Clip::none(),
            Clip::norm(0.5).non_finite(NonFinite::Zero),
        ];
        for clip in clips {
            let vars = row.vars()?;
            let mut opt = row.clipped(&vars, clip.clone())?;
            let stores = [0, 1].map(|step| row.gradients(step).map(|g| store_for(&vars, &g)));
            for store in stores {
                let store = store?;
                let before = bits_of_gradients(&store, &vars)?;
                // Twice, since the second step finds the buffer of the first.
                for _ in 0..2 {
                    row.run(|| opt.step(&store))?;
                    assert_eq!(bits_of_gradients(&store, &vars)?, before, "{row}, {clip}");
                }
            }
        }
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn step_and_step_report_take_the_same_step() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let (a, b, c, d) = (row.vars()?, row.vars()?, row.vars()?, row.vars()?);
        let clip = Clip::norm(1.0);
        let mut by_step = row.clipped(&a, clip.clone())?;
        let mut by_step_report = row.clipped(&b, clip.clone())?;
        let mut by_backward = row.clipped(&c, clip.clone())?;
        let mut by_backward_report = row.clipped(&d, clip)?;
        for step in 0..STEPS {
            let gradients = row.gradients(step)?;
            row.run(|| -> Result<()> {
                by_step.step(&store_for(&a, &gradients))?;
                let report = by_step_report.step_report(&store_for(&b, &gradients))?;
                by_backward.backward_step(&loss_with_gradients(&c, &gradients)?)?;
                let loss = loss_with_gradients(&d, &gradients)?;
                let backward_report = by_backward_report.backward_step_report(&loss)?;

                let last = by_step.last_report().unwrap().to_record()?;
                assert_eq!(last, report.to_record()?, "{row}");
                let last = by_backward.last_report().unwrap().to_record()?;
                assert_eq!(last, backward_report.to_record()?, "{row}");
                assert_eq!(report.total_norm()?, backward_report.total_norm()?, "{row}");
                let paths = [report.path(), backward_report.path()];
                let expected = if row.fused {
                    [StepPath::Fused; 2]
                } else {
                    [StepPath::Copied, StepPath::InPlace]
                };
                assert_eq!(paths, expected, "{row}");
                assert_eq!(report.step(), step + 1, "{row}");
                Ok(())
            })?;
        }
        let weights = bits_of_vars(&a)?;
        for vars in [&b, &c, &d] {
            assert_eq!(bits_of_vars(vars)?, weights, "{row}");
        }
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn another_clip_in_the_middle_of_training_holds_from_the_next_step() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let vars = row.vars()?;
        let mut opt = row.clipped(&vars, Clip::norm(1.0))?;
        let store = store_for(&vars, &row.gradients(1)?);
        let tolerance = row.tolerance();
        let limits = [1.0, 0.25, 3.0];
        for max_norm in limits {
            opt.set_clip(Clip::norm(max_norm))?;
            let clipped = row.run(|| opt.step_report(&store))?.clipped_norm()?;
            oracle::assert_close(clipped, max_norm, tolerance.max(1e-5), &row.to_string());
        }
        opt.set_clip(Clip::norm(-1.0)).unwrap_err();
        assert_eq!(
            opt.clip(),
            &Clip::norm(3.0),
            "a refused clip leaves the old one"
        );
        opt.set_clip(Clip::none())?;
        let report = row.run(|| opt.step_report(&store))?;
        assert!(!report.was_clipped()?, "{row}");
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn the_learning_rate_passes_through() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let (ours, theirs) = (row.vars()?, row.vars()?);
        let mut opt = row.clipped(&ours, Clip::none())?;
        let mut bare = row.bare(&theirs)?;
        assert_eq!(opt.learning_rate(), bare.learning_rate(), "{row}");
        let lr = opt.learning_rate() * 2.0;
        opt.set_learning_rate(lr);
        bare.set_learning_rate(lr);
        assert_eq!(opt.learning_rate(), lr, "{row}");
        assert_eq!(opt.inner().learning_rate(), lr, "{row}");
        let gradients = row.gradients(0)?;
        row.run(|| opt.step(&store_for(&ours, &gradients)))?;
        bare.step(&store_for(&theirs, &gradients))?;
        assert_eq!(bits_of_vars(&ours)?, bits_of_vars(&theirs)?, "{row}");
        opt.inner_mut().set_learning_rate(lr / 4.0);
        assert_eq!(opt.learning_rate(), lr / 4.0, "{row}");
        assert_eq!(opt.into_inner().learning_rate(), lr / 4.0, "{row}");
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

/// Code that knows only candle's trait.
fn generic_training<O: Optimizer>(
    vars: &[Var],
    config: O::Config,
    from_slice: bool,
    gradients: &[Tensor],
) -> candle_core::Result<f64> {
    let mut opt = if from_slice {
        O::from_slice(&vars.iter().collect::<Vec<_>>(), config)?
    } else {
        O::new(vars.to_vec(), config)?
    };
    opt.step(&store_for(vars, gradients))?;
    opt.backward_step(&loss_with_gradients(vars, gradients)?)?;
    opt.set_learning_rate(opt.learning_rate() / 2.0);
    opt.step(&store_for(vars, gradients))?;
    Ok(opt.learning_rate())
}

#[test]
fn code_that_is_generic_over_optimizers_takes_a_clipped_one() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let gradients = row.gradients(1)?;
        let by_hand = row.vars()?;
        let mut opt = row.clipped(&by_hand, Clip::norm(1.0))?;
        row.run(|| -> Result<()> {
            opt.step(&store_for(&by_hand, &gradients))?;
            opt.backward_step(&loss_with_gradients(&by_hand, &gradients)?)?;
            opt.set_learning_rate(opt.learning_rate() / 2.0);
            opt.step(&store_for(&by_hand, &gradients))?;
            Ok(())
        })?;
        let by_hand = bits_of_vars(&by_hand)?;
        for from_slice in [false, true] {
            let vars = row.vars()?;
            let config = ClippedConfig {
                inner: (row.config)(),
                clip: Clip::norm(1.0),
            };
            row.run(|| {
                generic_training::<ClippedOptimizer<O>>(&vars, config, from_slice, &gradients)
            })?;
            assert_eq!(
                bits_of_vars(&vars)?,
                by_hand,
                "{row}, from_slice: {from_slice}"
            );
        }
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn an_empty_optimizer_takes_steps() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let config = ClippedConfig {
            inner: (row.config)(),
            clip: Clip::norm(1.0),
        };
        let mut opt = ClippedOptimizer::<O>::empty(config)?;
        let vars = row.vars()?;
        let store = store_for(&vars, &row.gradients(0)?);
        let before = bits_of_vars(&vars)?;
        let report = row.run(|| opt.step_report(&store))?;
        assert_eq!(
            (report.total_norm()?, report.clip_coef()?),
            (0.0, 1.0),
            "{row}"
        );
        assert_eq!(
            bits_of_vars(&vars)?,
            before,
            "{row}: the Vars are not its own"
        );
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn new_checks_the_clip() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let config = ClippedConfig {
            inner: (row.config)(),
            clip: Clip::norm(0.0),
        };
        let error = ClippedOptimizer::<O>::new(row.vars()?, config).unwrap_err();
        let text = "max_norm is 0, expected a value above 0: 0 would set every gradient to 0; \
                    Clip::none() turns clipping off";
        assert!(error.to_string().starts_with(text), "{error}");
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

#[test]
fn debug_shows_the_inner_type_and_the_clip() -> Result<()> {
    fn promise<O: Optimizer + 'static>(row: &Row<O>) -> Result<()> {
        let opt = row.clipped(&row.vars()?, Clip::norm(1.5))?;
        let shown = format!("{opt:?}");
        assert!(shown.contains(std::any::type_name::<O>()), "{shown}");
        assert!(shown.contains("max_norm: 1.5"), "{shown}");
        Ok(())
    }
    for_every_row!(promise);
    Ok(())
}

fn pair(name: &str, values: &[f64]) -> Result<(String, Var)> {
    Ok((name.to_string(), Var::new(values, &Device::Cpu)?))
}

/// A loss whose gradient is the Vars' own values.
fn half_square(vars: &[&Var]) -> Result<Tensor> {
    let squares = vars.iter().map(|var| var.sqr()?.sum_all());
    let mut sum = Tensor::new(0f64, &Device::Cpu)?;
    for square in squares {
        sum = (sum + square?)?;
    }
    Ok((sum / 2.0)?)
}

#[test]
fn an_inner_optimizer_that_trains_more_is_refused_by_name() -> Result<()> {
    let (embed, head) = (pair("embed", &[3.0, 4.0])?, pair("head", &[1.0])?);
    let all = vec![embed.clone(), head.clone()];
    let only = vec![head.clone()];
    let error = ClippedOptimizer::wrap(Sgd::named(all.clone(), 0.1)?, only.clone(), Clip::none());
    let error = error.unwrap_err();
    assert!(
        matches!(&error, Error::UnclippedVars { vars } if vars == &["embed"]),
        "{error}"
    );

    // Through `inner_mut`: at the step, and nothing is changed.
    let mut opt =
        ClippedOptimizer::wrap(Sgd::named(only.clone(), 0.1)?, only.clone(), Clip::none())?;
    *opt.inner_mut() = Sgd::named(all.clone(), 0.1)?;
    let loss = half_square(&[&embed.1, &head.1])?;
    for _ in 0..2 {
        let error = opt.backward_step_report(&loss).unwrap_err();
        assert!(
            matches!(&error, Error::UnclippedVars { vars } if vars == &["embed"]),
            "{error}"
        );
    }
    assert_eq!(opt.inner().steps(), 0);
    assert_eq!(embed.1.to_vec1::<f64>()?, [3.0, 4.0]);
    assert_eq!(head.1.to_vec1::<f64>()?, [1.0]);
    *opt.inner_mut() = Sgd::new_lr(vec![], 0.1)?;
    let error = opt.backward_step_report(&loss).unwrap_err();
    assert!(
        matches!(&error, Error::UntrainedVars { vars } if vars == &["head"]),
        "{error}"
    );
    *opt.inner_mut() = Sgd::named(only.clone(), 0.1)?;
    opt.backward_step(&loss)?;
    assert_eq!(head.1.to_vec1::<f64>()?, [0.9]);

    // Allowed: a pattern, and the loss's scale goes out of it.
    let (embed, head) = (pair("embed", &[3.0, 4.0])?, pair("head", &[1.0])?);
    let inner = Sgd::named(vec![embed.clone(), head.clone()], 0.5)?;
    let clip = Clip::norm(0.5).eps(0.0);
    let opt = ClippedOptimizer::wrap_allow_unclipped(inner, vec![head.clone()], clip, &["em*"])?;
    let mut opt = opt.with_loss_scaler(LossScaler::default())?;
    let report = opt.backward_step_report(&half_square(&[&embed.1, &head.1])?)?;
    assert_eq!(report.total_norm()?, 1.0);
    assert_eq!(embed.1.to_vec1::<f64>()?, [1.5, 2.0]);
    assert_eq!(head.1.to_vec1::<f64>()?, [0.75]);
    Ok(())
}

#[test]
fn vars_that_a_fused_optimizer_does_not_train_count_in_no_norm() -> Result<()> {
    let (body, head) = (pair("body", &[60.0, 80.0])?, pair("head", &[1.0])?);
    let inner = Sgd::named(vec![head.clone()], 1.0)?;
    let all = vec![body.clone(), head.clone()];
    let mut opt = ClippedOptimizer::wrap(inner, all, Clip::norm(1.0).eps(0.0))?;
    assert_eq!(opt.vars().names(), ["head"]);
    let report = opt.backward_step_report(&half_square(&[&body.1, &head.1])?)?;
    assert_eq!((report.total_norm()?, report.clip_coef()?), (1.0, 1.0));
    assert_eq!(head.1.to_vec1::<f64>()?, [0.0]); // a step of 1, not of 0.01
    Ok(())
}

#[test]
fn two_vars_of_one_name_are_told_by_wrap() -> Result<()> {
    let twice = vec![pair("w", &[1.0])?, pair("w", &[2.0])?];
    let vars: Vec<Var> = twice.iter().map(|(_, var)| var.clone()).collect();
    let errors = [
        ClippedOptimizer::wrap(SGD::new(vars.clone(), 0.1)?, twice.clone(), Clip::none()).err(),
        ClippedOptimizer::wrap(Sgd::new_lr(vars, 0.1)?, twice, Clip::none()).err(),
    ];
    for error in errors {
        assert!(matches!(error, Some(Error::DuplicateName { name }) if name == "w"));
    }
    Ok(())
}

#[test]
fn a_store_of_other_vars_is_an_error_in_every_free_function() -> Result<()> {
    type Call = fn(&mut GradStore, &[Var]) -> candle_grad_clip::Result<()>;

    let (a, b) = (pair("a", &[3.0, 4.0])?.1, pair("b", &[1.0])?.1);
    let mut grads = half_square(&[&a])?.backward()?;
    let (ours, others) = (vec![b.clone(), a.clone()], vec![b]);
    let calls: [Call; 6] = [
        |grads, vars| clip_grad_norm(grads, vars, 1e9).map(drop),
        |grads, vars| {
            let options = ClipGradNorm {
                max_norm: f64::INFINITY,
                ..ClipGradNorm::default()
            };
            clip_grad_norm_with(grads, vars, &options).map(drop)
        },
        |grads, vars| clip_grads_with_norm(grads, vars, 1e9, 5.0),
        |grads, vars| clip_grad_value(grads, vars, f64::INFINITY),
        |grads, vars| clip_by_global_norm(grads, vars, 1e9, None).map(drop),
        |grads, vars| total_norm(grads, vars, NormType::L2).map(drop),
    ];
    for (i, call) in calls.into_iter().enumerate() {
        let error = call(&mut grads, &others).unwrap_err();
        assert!(
            matches!(error, Error::NoGradients { vars: 1, .. }),
            "{i} {error}"
        );
        assert!(error.to_string().contains("another model"), "{i} {error}");
        call(&mut grads, &ours)?;
        call(&mut grads, &[])?;
        call(&mut GradStore::default(), &others)?;
    }
    assert_eq!(values(grads.get(&a).unwrap())?, [3.0, 4.0]);
    Ok(())
}

#[test]
fn a_scaler_unscales_what_another_optimizer_trains_beside() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for backward in [false, true] {
            let var = |values: &[f64]| -> Result<Var> {
                let values = Tensor::new(values, &Device::Cpu)?.to_dtype(dtype)?;
                Ok(Var::from_tensor(&values)?)
            };
            let (known, unknown) = (var(&[1.0])?, var(&[1.0, 2.0])?);
            let sgd = SGD::new(vec![known.clone(), unknown.clone()], 0.5)?;
            let opt = ClippedOptimizer::wrap(sgd, vec![known.clone()], Clip::none())?;
            let mut opt = opt.with_loss_scaler(LossScaler::default().init_scale(1024.0))?;
            let loss = (known.sum_all()? + unknown.sum_all()?)?;
            if backward {
                opt.backward_step(&loss)?;
            } else {
                let grads = opt.scale_loss(&loss)?.backward()?;
                opt.step(&grads)?;
                assert_eq!(values(grads.get(&unknown).unwrap())?, [1024.0, 1024.0]);
            }
            assert_eq!(values(&known)?, [0.5], "{dtype:?} {backward}");
            assert_eq!(values(&unknown)?, [0.5, 1.5], "{dtype:?} {backward}");
        }
    }
    Ok(())
}

#[test]
fn a_skip_of_a_wrapper_inside_is_seen_outside() -> Result<()> {
    let w = pair("w", &[3.0, 4.0])?.1;
    let vars = vec![w.clone()];
    let inner = ClippedOptimizer::wrap(
        Sgd::new_lr(vars.clone(), 0.1)?,
        vars.clone(),
        Clip::skip_norm(2.0),
    )?;
    let clip = Clip::norm(1e9).non_finite(NonFinite::Propagate);
    let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip)?;
    let loss = half_square(&[&w])?;
    let report = opt.backward_step_report(&loss)?;
    assert_eq!(report.skip_reason()?, Some(SkipReason::LargeNorm));
    assert!(report.skipped()?);
    assert_eq!(report.path(), StepPath::Skipped);
    assert_eq!(w.to_vec1::<f64>()?, [3.0, 4.0]);
    let report = opt.step_report(&(loss * 0.25)?.backward()?)?; // a norm of 1.25
    assert!(!report.skipped()?);
    assert_eq!(w.to_vec1::<f64>()?, [2.925, 3.9]);

    // Both clip: to a norm of 1 outside, then to a value of 0.7 inside.
    let w = pair("w", &[3.0, 4.0])?.1;
    let vars = vec![w.clone()];
    let inner = ClippedOptimizer::wrap(
        Sgd::new_lr(vars.clone(), 1.0)?,
        vars.clone(),
        Clip::value(0.7),
    )?;
    let mut opt = ClippedOptimizer::wrap(inner, vars, Clip::norm(1.0).eps(0.0))?;
    opt.backward_step(&half_square(&[&w])?)?;
    let expected = [3.0 - 0.6, 4.0 - 0.7];
    for (value, expected) in w.to_vec1::<f64>()?.into_iter().zip(expected) {
        assert!((value - expected).abs() < 1e-12, "{value}");
    }
    Ok(())
}

#[test]
fn a_scaler_on_a_wrapper_inside_is_refused() -> Result<()> {
    let w = pair("w", &[3.0, 4.0])?.1;
    let vars = vec![w.clone()];
    let wrap = |inner| ClippedOptimizer::wrap(inner, vars.clone(), Clip::none());
    let inner = wrap(Sgd::new_lr(vars.clone(), 0.5)?)?.with_loss_scaler(LossScaler::default())?;
    let outer = |inner| ClippedOptimizer::wrap(inner, vars.clone(), Clip::none());
    let mut opt = outer(inner)?;
    let error = opt.backward_step_report(&half_square(&[&w])?).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the LossScaler on the outermost one"),
        "{error}"
    );
    assert!(opt.last_report().is_none());
    assert_eq!(w.to_vec1::<f64>()?, [3.0, 4.0]);

    let mut opt =
        outer(wrap(Sgd::new_lr(vars.clone(), 0.5)?)?)?.with_loss_scaler(LossScaler::default())?;
    opt.backward_step(&half_square(&[&w])?)?;
    assert_eq!(w.to_vec1::<f64>()?, [1.5, 2.0]);
    Ok(())
}

#[test]
fn a_learning_rate_that_ruins_is_refused_around_any_optimizer() -> Result<()> {
    let w = pair("w", &[3.0, 4.0])?.1;
    let vars = vec![w.clone()];
    let mut other =
        ClippedOptimizer::wrap(SGD::new(vars.clone(), 0.1)?, vars.clone(), Clip::none())?;
    let mut fused = ClippedOptimizer::wrap(Sgd::new_lr(vars.clone(), 0.1)?, vars, Clip::none())?;
    let loss = half_square(&[&w])?;
    for learning_rate in [f64::NAN, -0.1, f64::INFINITY, f64::NEG_INFINITY] {
        other.set_learning_rate(learning_rate);
        let error = other.backward_step_report(&loss).unwrap_err();
        assert!(error.to_string().contains("learning rate is"), "{error}");
        let error = other.step_report(&loss.backward()?).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { .. }), "{error}");
        fused.set_learning_rate(learning_rate);
        let error = fused.backward_step_report(&loss).unwrap_err();
        assert!(
            matches!(error, Error::InvalidOption { name: "lr", .. }),
            "{error}"
        );
        assert_eq!(w.to_vec1::<f64>()?, [3.0, 4.0]);
    }
    assert!(other.last_report().is_none() && fused.last_report().is_none());
    Ok(())
}
