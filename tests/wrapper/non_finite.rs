//! What a NaN or an infinite gradient does, for every row of the table and every policy.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NonFinite, StepPath, StepReport};
use candle_nn::Optimizer;
use support::device::device;
use support::for_every_row;
use support::gradients::{
    all_values, all_values_of_vars, bits_of_gradients, bits_of_vars, loss_with_gradients,
    store_for, tensor, values,
};
use support::oracle::{self, assert_all_close};
use support::registry::Row;

/// The Var that gets the bad elements: not the first, so that an error has to look for it.
const BAD_VAR: usize = 1;

/// Gradients of a step with `bad` put into the second element of one of them.
pub(super) fn bad_gradients<O: Optimizer + 'static>(
    row: &Row<O>,
    step: u64,
    bad: f64,
) -> Result<Vec<Tensor>> {
    let mut gradients = row.gradients(step)?;
    let mut elements = values(&gradients[BAD_VAR])?;
    elements[1] = bad;
    let old = &gradients[BAD_VAR];
    gradients[BAD_VAR] = tensor(&elements, old.shape(), old.dtype())?;
    Ok(gradients)
}

pub(super) fn every_bad_value() -> [f64; 3] {
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
                        let record = report.record()?;
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
                matches!(&error, Error::TooManySkips { skips: 3, max_skips: 2, var: Some(var), .. } if var == "var.1"),
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
                assert_eq!(report.record()?.non_finite, 1, "{what}");
                assert_eq!(report.total_norm()?, right.total_norm()?, "{what}");
                assert_eq!(report.clip_coef()?, right.clip_coef()?, "{what}");
                assert_eq!(
                    report.record()?.clipped_norm,
                    right.record()?.clipped_norm,
                    "{what}"
                );
                assert_eq!(
                    report.record()?.num_clipped,
                    right.record()?.num_clipped,
                    "{what}"
                );
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
