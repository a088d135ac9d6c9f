//! `NormStatistics`: how often clipping acted, and which limit to take.

use anyhow::Result;
use candle_core::DType;
use candle_grad_clip::{Clip, ClippedOptimizer, NonFinite, NormStatistics};
use candle_nn::Optimizer;
use support::gradients::{store_of, tensor};
use support::optimizers::Recorder;
use support::oracle::assert_close;

/// The summary of steps whose gradients have these norms.
fn summary_of(norms: &[f64], clip: &Clip) -> Result<NormStatistics> {
    let (vars, _) = store_of(&[tensor(&[0.0], 1, DType::F64)?])?;
    let inner = Recorder::new(vars.clone(), false)?;
    let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip.clone())?;
    let mut summary = NormStatistics::default();
    for norm in norms {
        let gradient = tensor(&[-norm], 1, DType::F64)?;
        let store = support::gradients::store_for(&vars, &[gradient]);
        summary.add(&opt.step_report(&store)?)?;
    }
    Ok(summary)
}

/// 1, 2, ..., 100 in an order of their own.
fn one_to_hundred() -> Vec<f64> {
    let mut norms: Vec<f64> = (1..=100).map(f64::from).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut norms);
    norms
}

#[test]
fn percentiles_are_numpys() -> Result<()> {
    let summary = summary_of(&one_to_hundred(), &Clip::none())?;
    // numpy.percentile(range(1, 101), [0, 25, 50, 75, 90, 95, 99, 100])
    let right = [
        (0.0, 1.0),
        (25.0, 25.75),
        (50.0, 50.5),
        (75.0, 75.25),
        (90.0, 90.1),
        (95.0, 95.05),
        (99.0, 99.01),
        (100.0, 100.0),
    ];
    for (percentile, right) in right {
        let ours = summary.percentile_norm(percentile).unwrap();
        assert_close(ours, right, 1e-12, &format!("p{percentile}"));
    }
    assert_eq!(summary.median_norm(), summary.percentile_norm(50.0));
    for percentile in [-1.0, 100.1, f64::NAN] {
        assert_eq!(summary.percentile_norm(percentile), None);
    }
    Ok(())
}

#[test]
fn a_suggestion_clips_what_it_says() -> Result<()> {
    let norms = one_to_hundred();
    let suggestions = summary_of(&norms, &Clip::none())?.suggest_max_norm();
    let percentiles: Vec<f64> = suggestions.iter().map(|s| s.percentile).collect();
    assert_eq!(percentiles, [50.0, 75.0, 90.0, 95.0, 99.0]);
    for suggestion in suggestions {
        let clipped = summary_of(&norms, &Clip::norm(suggestion.max_norm).eps(0.0))?;
        assert_eq!(
            clipped.clipped_fraction(),
            suggestion.clipped_fraction,
            "{suggestion}"
        );
    }
    Ok(())
}

#[test]
fn a_suggestion_reads_as_a_sentence() -> Result<()> {
    let suggestions = summary_of(&one_to_hundred(), &Clip::none())?.suggest_max_norm();
    let text = "p90: max_norm 9.010e1 would clip 10 % of the steps";
    assert_eq!(suggestions[2].to_string(), text);
    Ok(())
}

#[test]
fn clipped_and_skipped_steps_are_counted() -> Result<()> {
    let norms = [0.5, 2.0, f64::NAN, 3.0, f64::INFINITY, 0.25, 0.75, 4.0];
    let summary = summary_of(&norms, &Clip::norm(1.0))?;
    assert_eq!((summary.steps(), summary.skipped()), (8, 2));
    assert_eq!(summary.clipped_fraction(), 3.0 / 8.0);
    assert_eq!(summary.median_norm(), Some(1.375), "of the finite ones");

    let summary = summary_of(&norms, &Clip::value(1.0).non_finite(NonFinite::Zero))?;
    assert_eq!((summary.steps(), summary.skipped()), (8, 0));
    assert_eq!(
        summary.clipped_fraction(),
        3.0 / 8.0,
        "what is not finite became 0"
    );
    Ok(())
}

#[test]
fn one_step_is_its_own_percentiles() -> Result<()> {
    let summary = summary_of(&[7.0], &Clip::none())?;
    for suggestion in summary.suggest_max_norm() {
        assert_eq!(
            (suggestion.max_norm, suggestion.clipped_fraction),
            (7.0, 0.0)
        );
    }
    Ok(())
}

#[test]
fn a_suggestion_is_a_limit_that_clip_takes() -> Result<()> {
    // Gradients of zero are common in a model that is cut off: 0 is no limit.
    let (vars, _) = store_of(&[tensor(&[0.0], 1, DType::F64)?])?;
    for norms in [vec![0.0; 9], vec![0.0, 0.0, 0.0, 1.0]] {
        for suggestion in summary_of(&norms, &Clip::none())?.suggest_max_norm() {
            let inner = Recorder::new(vars.clone(), false)?;
            ClippedOptimizer::wrap(inner, vars.clone(), Clip::norm(suggestion.max_norm))?;
        }
    }
    Ok(())
}

#[test]
fn norms_that_are_not_finite_are_counted_under_every_policy() -> Result<()> {
    let norms = [1.0, f64::NAN, 3.0, f64::INFINITY, f64::NAN];
    for (policy, non_finite, skipped) in [
        (NonFinite::SkipStep, 3, 3),
        // Not skipped: only this count tells of them.
        (NonFinite::Propagate, 3, 0),
    ] {
        for clip in [Clip::norm(2.0), Clip::value(2.0), Clip::none()] {
            let what = format!("{policy:?} {clip}");
            let summary = summary_of(&norms, &clip.non_finite(policy))?;
            assert_eq!(summary.steps(), 5, "{what}");
            assert_eq!(summary.non_finite(), non_finite, "{what}");
            assert_eq!(summary.skipped(), skipped, "{what}");
            assert_eq!(summary.median_norm(), Some(2.0), "{what}");
            assert!(summary.clipped_fraction().is_finite(), "{what}");
            for suggestion in summary.suggest_max_norm() {
                assert!(suggestion.max_norm.is_finite(), "{what}");
            }
        }
    }
    Ok(())
}
