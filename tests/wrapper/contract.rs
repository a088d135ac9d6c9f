//! Promises that hold for every row of the table (optimizer x dtype x backend).

use anyhow::Result;
use candle_core::{Tensor, Var};
use candle_grad_clip::{Clip, ClippedConfig, ClippedOptimizer, NonFinite, NormType, StepPath};
use candle_nn::Optimizer;
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
            Clip::skip_above_norm(1e4),
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

                let last = by_step.last_report().unwrap().record()?;
                assert_eq!(last, report.record()?, "{row}");
                let last = by_backward.last_report().unwrap().record()?;
                assert_eq!(last, backward_report.record()?, "{row}");
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
            let clipped = row.run(|| opt.step_report(&store))?.record()?.clipped_norm;
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
