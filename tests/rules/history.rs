//! What enters a history, and when.

use support::device::kernels;
use support::gradients::without_names;
use support::optimizers::Failing;

use anyhow::Result;
use candle_grad_clip::optim::{ParamGroup, ParamGroups};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NonFinite, SkipReason};
use candle_nn::Optimizer;
use support::oracle::{assert_all_close, assert_close};

use super::{Gradients, fused, plain, random_history, step, store, with_history, zeros};

/// What each step gave the inner optimizer.
fn run(clip: &Clip, history: &[Gradients], disturbed: bool) -> Result<Vec<Vec<Vec<f64>>>> {
    let named = zeros()?;
    let inner = Failing::new(without_names(&named), 1.0)?;
    let mut opt = ClippedOptimizer::wrap(inner, named.clone(), clip.clone())?;
    let mut got = Vec::new();
    for (at, gradients) in history.iter().enumerate() {
        if disturbed && at % 3 == 1 {
            let mut bad = gradients.clone();
            bad[1] = Some(vec![
                [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][at / 3 % 3],
            ]);
            assert!(opt.step_report(&store(&named, &bad)?)?.skipped()?, "{clip}");
        }
        if disturbed && at % 4 == 2 {
            opt.inner_mut().fails = true;
            let other = store(&named, &history[at / 2])?;
            if let Ok(report) = opt.step_report(&other) {
                assert!(report.skipped()?, "{clip}"); // by the rule, before it could fail
            }
            opt.inner_mut().fails = false;
        }
        got.push(step(&mut opt, &named, gradients, kernels())?.0);
    }
    Ok(got)
}

#[test]
fn a_step_that_is_skipped_or_fails_leaves_the_history_alone() -> Result<()> {
    for clip in with_history() {
        for seed in 0..10 {
            let history = random_history(seed, 40);
            assert_eq!(
                run(&clip, &history, true)?,
                run(&clip, &history, false)?,
                "{clip}"
            );
        }
    }
    Ok(())
}

/// A norm that f64 can't hold, of finite gradients, is clipped and does not enter.
#[test]
fn a_norm_past_the_largest_number_never_enters() -> Result<()> {
    let huge: Gradients = vec![Some(vec![f64::MAX; 3]), Some(vec![1.0]), None];
    for clip in with_history() {
        let history = random_history(5, 20);
        let undisturbed = run(&clip, &history, false)?;
        let (named, mut opt) = plain(clip.clone())?;
        for (gradients, right) in history.iter().zip(undisturbed) {
            let (got, _) = step(&mut opt, &named, gradients, kernels())?;
            // (Each Var's own norm does fit, so these rules take it.)
            let is_of_vars = ["adagc", "stabilizer"].map(|name| clip.to_string().contains(name));
            assert!(got == right || is_of_vars.contains(&true), "{clip}");
            let (got, report) = step(&mut opt, &named, &huge, kernels())?;
            assert!(
                report.record()?.clipped_norm.is_finite() || !report.was_clipped()?,
                "{clip}"
            );
            assert!(got.concat().iter().all(|x| x.is_finite()), "{clip}");
        }
    }
    Ok(())
}

#[test]
fn zeroed_gradients_enter_with_the_norm_that_is_left() -> Result<()> {
    let (named, mut opt) = plain(Clip::autoclip(50.0).non_finite(NonFinite::Zero))?;
    let first: Gradients = vec![Some(vec![3.0, f64::NAN, 4.0]), None, None];
    step(&mut opt, &named, &first, kernels())?;
    let second: Gradients = vec![Some(vec![15.0, 0.0, 0.0]), None, None];
    let (_, report) = step(&mut opt, &named, &second, kernels())?;
    assert_close(
        report.record()?.clipped_norm,
        10.0,
        1e-6,
        "the median of 5 and 15",
    );
    Ok(())
}

/// The next step shows what is left of the history.
fn clipped_norm_after(before: Clip, after: Clip) -> Result<f64> {
    let (named, mut opt) = fused(before)?;
    for norm in [1.0, 2.0, 9.0] {
        step(&mut opt, &named, &[None, Some(vec![norm]), None], kernels())?;
    }
    opt.set_clip(after)?;
    let last = step(
        &mut opt,
        &named,
        &[None, Some(vec![100.0]), None],
        kernels(),
    )?;
    Ok(last.1.record()?.clipped_norm)
}

#[test]
fn another_clip_of_the_same_method_keeps_the_history() -> Result<()> {
    let auto = |text: &str| clipped_norm_after(Clip::autoclip(10.0), text.parse().unwrap());
    assert_close(auto("auto:0")?, 1.0, 1e-6, "the smallest of all");
    assert_close(
        auto("auto:0,window=3")?,
        2.0,
        1e-6,
        "the smallest of the last three",
    );
    assert_close(
        auto("auto:0,window=2")?,
        9.0,
        1e-6,
        "the smallest of the last two",
    );
    assert_close(auto("norm:50")?, 50.0, 1e-6, "another method");
    // Starts anew: the first norm is its own limit.
    assert_close(
        clipped_norm_after(Clip::norm(1.0), Clip::autoclip(10.0))?,
        100.0,
        1e-6,
        "anew",
    );
    Ok(())
}

#[test]
fn limits_of_groups_come_on_top() -> Result<()> {
    for (clip, coefs) in [
        (Clip::param_norm(2.0).eps(0.0), [0.25, 1.0, 0.5]),
        (Clip::autoclip(10.0).eps(0.0), [0.25, 1.0, 1.0]),
        (Clip::skip_above_norm(100.0).eps(0.0), [0.25, 1.0, 1.0]),
        (Clip::block_rms(0.5), [0.5 / (4.0 / 3f64.sqrt()), 0.5, 0.25]),
    ] {
        let groups = ParamGroups::new(vec![
            ParamGroup::new("first", &["layer0"]).max_norm(1.0),
            ParamGroup::new("second", &["layer1"]).max_norm(50.0),
        ])?;
        let (named, opt) = fused(clip.clone())?;
        let mut opt = opt.with_param_groups(groups)?;
        let gradients: Gradients = vec![
            Some(vec![4.0, 0.0, 0.0]),
            Some(vec![1.0]),
            Some(vec![2.0; 4]),
        ];
        let (got, report) = step(&mut opt, &named, &gradients, kernels())?;
        let first = if clip == Clip::block_rms(0.5) {
            coefs[0].min(0.25)
        } else {
            coefs[0]
        };
        assert_close(got[0][0], 4.0 * first, 1e-12, &clip.to_string());
        assert_close(got[1][0], coefs[1], 1e-12, &clip.to_string());
        assert_close(got[2][0], 2.0 * coefs[2], 1e-12, &clip.to_string());
        let groups: Vec<f64> = report
            .record()?
            .groups
            .iter()
            .map(|group| group.clip_coef)
            .collect();
        assert_close(groups[0], first, 1e-12, &clip.to_string());
        assert_close(groups[1], coefs[1], 1e-12, &clip.to_string());
        let norm = got.concat().iter().map(|x| x * x).sum::<f64>().sqrt();
        assert_close(
            report.record()?.clipped_norm,
            norm,
            1e-12,
            &clip.to_string(),
        );
    }
    Ok(())
}

/// A group's limit bounds what a rule enlarges; without one it is enlarged in full.
#[test]
fn limits_of_groups_bound_coefficients_above_one() -> Result<()> {
    let groups = ParamGroups::new(vec![
        ParamGroup::new("first", &["layer0"]).max_norm(0.5),
        ParamGroup::new("second", &["layer1"]).max_norm(50.0),
    ])?;
    let (named, opt) = fused(Clip::stabilizer().eps(0.0))?;
    let mut opt = opt.with_param_groups(groups)?;
    let gradients: Gradients = vec![
        Some(vec![0.0, -0.1, 0.0]),
        Some(vec![0.1]),
        Some(vec![0.05; 4]),
    ];
    let (got, report) = step(&mut opt, &named, &gradients, kernels())?;
    let right = [0.0, -0.5, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5];
    assert_all_close(&got.concat(), &right, 1e-12, "lengths 0.5, 1 and 1");
    let record = report.record()?;
    let coefs: Vec<f64> = record.groups.iter().map(|group| group.clip_coef).collect();
    assert_all_close(&coefs, &[5.0, 10.0], 1e-12, "of the groups");
    assert_close(record.clip_coef, 5.0, 1e-12, "the smallest");
    assert_close(record.clipped_norm, 1.5, 1e-12, "0.25 + 1 + 1");
    assert!(record.was_clipped);
    Ok(())
}

#[test]
fn too_many_large_norms_in_a_row_are_an_error() -> Result<()> {
    let (named, mut opt) = fused(Clip::skip_above_norm(1.0).max_skips(2))?;
    let large = store(&named, &[None, Some(vec![7.0]), None])?;
    for _ in 0..2 {
        assert!(opt.step_report(&large)?.skipped()?);
    }
    let error = opt.step_report(&large).unwrap_err();
    let expected = matches!(
        error,
        Error::TooManySkips {
            reason: SkipReason::LargeNorm,
            skips: 3,
            max_skips: 2,
            total_norm: 7.0,
            ..
        }
    );
    assert!(expected, "{error}");
    assert!(error.to_string().contains("skip:norm=1"), "{error}");
    // A step that is taken ends the row.
    opt.step_report(&store(&named, &[None, Some(vec![0.5]), None])?)?;
    assert!(opt.step_report(&large)?.skipped()?);
    Ok(())
}
