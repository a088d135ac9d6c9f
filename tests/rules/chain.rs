//! `Clip::chain`: rules one after the other.

use anyhow::Result;
use candle_grad_clip::{Clip, Error, NonFinite, NormType, SkipReason};
use support::device::backends;
use support::oracle::{assert_all_close, assert_close};

use super::{Gradients, fused, plain, random_history, step};

fn l2(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

const LISTS: [&str; 18] = [
    "value:0.5+norm:1",
    "value:0.3+param-norm:0.4",
    "value:0.3+param-norm:0.4+norm:0.5",
    "norm:2+param-norm:1",
    "param-norm:1+norm:1.2",
    "block-rms:0.5+norm:1",
    "agc:clipping=200+norm:0.1",
    "norm:0.5+agc:clipping=100",
    "param-norm:0.5+agc:clipping=100+norm:0.2",
    "skip:norm=40+value:0.5+norm:1",
    "skip:norm=40,max_norm=3+param-norm:1",
    "auto:40+param-norm:0.2",
    "zclip:warmup=5,z_thresh=1+adagc:warmup=4",
    "quantile:0.5+zclip:warmup=3,max_norm=inf",
    "stabilizer+norm:1.2",
    "norm:0.5+stabilizer",
    "value:0.3+stabilizer",
    "stabilizer+agc:clipping=100",
];

/// A list is what wrappers around each other do, each with one of its rules: of which the outermost
/// sees the gradients first.
#[test]
fn a_list_is_one_wrapper_in_another() -> Result<()> {
    for text in LISTS {
        let rules: Vec<&str> = text.split('+').collect();
        for seed in 0..10 {
            for backend in backends() {
                let (named, mut whole) = plain(text.parse()?)?;
                let (named_fused, mut fused) = fused(text.parse()?)?;
                let mut parts = Vec::new();
                for rule in &rules {
                    parts.push(plain(rule.parse()?)?);
                }
                for (at, gradients) in random_history(seed, 15).into_iter().enumerate() {
                    let what = format!("{text}, {seed}, {at}, {backend:?}");
                    let mut now: Gradients = gradients.clone();
                    let (mut coef, mut skipped) = (1.0, None);
                    for (named, opt) in &mut parts {
                        let (got, report) = step(opt, named, &now, backend)?;
                        skipped = skipped.or(report.record()?.skip_reason);
                        if skipped.is_some() {
                            break;
                        }
                        coef *= report.clip_coef()?;
                        for (gradient, got) in now.iter_mut().zip(got) {
                            if let Some(gradient) = gradient {
                                *gradient = got;
                            }
                        }
                    }
                    let (got, report) = step(&mut whole, &named, &gradients, backend)?;
                    let (of_fused, _) = step(&mut fused, &named_fused, &gradients, backend)?;
                    assert_eq!(report.record()?.skip_reason, skipped, "{what}");
                    if skipped.is_some() {
                        // The rules before it have seen this step, those of the list have not.
                        break;
                    }
                    let right: Vec<f64> = now.iter().flatten().flatten().copied().collect();
                    let present = |got: Vec<Vec<f64>>| -> Vec<f64> {
                        let got = got.into_iter().zip(&gradients);
                        got.filter(|(_, gradient)| gradient.is_some())
                            .flat_map(|(got, _)| got)
                            .collect()
                    };
                    assert_all_close(&present(got), &right, 1e-12, &what);
                    assert_all_close(&present(of_fused), &right, 1e-12, &what);
                    assert_close(report.record()?.clipped_norm, l2(&right), 1e-11, &what);
                    assert!(report.clip_coef()? >= coef * (1.0 - 1e-12), "{what}");
                    let before: Vec<f64> = gradients.iter().flatten().flatten().copied().collect();
                    assert_close(report.total_norm()?, l2(&before), 1e-12, &what);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn value_then_norm_by_hand() -> Result<()> {
    for backend in backends() {
        let clip = Clip::chain([Clip::value(3.0), Clip::norm(1.0).eps(0.0)])?;
        let (named, mut opt) = plain(clip)?;
        let gradients: Gradients = vec![Some(vec![30.0, 0.0, 0.0]), Some(vec![-4.0]), None];
        let (got, report) = step(&mut opt, &named, &gradients, backend)?;
        let x = 0.5f64.sqrt();
        assert_all_close(&got.concat()[..4], &[x, 0.0, 0.0, -x], 1e-12, "clipped");
        assert_eq!(report.record()?.num_clipped, 2);
        assert_close(report.total_norm()?, 916f64.sqrt(), 1e-12, "before");
        assert_close(
            report.clip_coef()?,
            1.0 / 18f64.sqrt(),
            1e-12,
            "coefficient",
        );
        assert_close(report.record()?.clipped_norm, 1.0, 1e-12, "after");
    }
    Ok(())
}

#[test]
fn what_is_not_finite() -> Result<()> {
    let gradients: Gradients = vec![Some(vec![f64::INFINITY, 4.0, 0.0]), Some(vec![3.0]), None];
    for backend in backends() {
        let run = |policy| -> Result<_> {
            let clip = Clip::chain([Clip::value(5.0), Clip::param_norm(1.0).eps(0.0)])?;
            let (named, mut opt) = plain(clip.non_finite(policy))?;
            step(&mut opt, &named, &gradients, backend)
        };
        let (got, report) = run(NonFinite::Zero)?;
        assert_all_close(&got.concat()[..4], &[0.0, 1.0, 0.0, 1.0], 1e-12, "zero");
        assert_close(report.record()?.clipped_norm, 2f64.sqrt(), 1e-12, "zero");
        let (got, report) = run(NonFinite::Propagate)?;
        let root = 41f64.sqrt(); // the infinite one becomes the bound
        assert_all_close(
            &got.concat()[..4],
            &[5.0 / root, 4.0 / root, 0.0, 1.0],
            1e-12,
            "propagate",
        );
        assert!(
            (report.record()?.clipped_norm - 2f64.sqrt()).abs() < 1e-12
                || report.record()?.clipped_norm.is_nan()
        );
        assert_eq!(
            run(NonFinite::SkipStep)?.1.record()?.skip_reason,
            Some(SkipReason::NonFinite)
        );
        assert!(run(NonFinite::Error).is_err());
    }
    Ok(())
}

#[test]
fn settings_of_all_are_merged() -> Result<()> {
    let clip = Clip::chain([
        Clip::value(1.0).max_skips(3),
        Clip::none(),
        Clip::norm(1.0).norm_type(NormType::L1),
    ])?;
    let text = "value:1+norm:1,norm_type=1,max_skips=3";
    assert_eq!(clip.to_string(), text);
    assert_eq!(clip, text.parse()?);
    assert_eq!(clip, " value:1,max_skips=3 + norm:1,norm_type=1 ".parse()?);
    assert_eq!(Clip::chain([Clip::norm(2.0)])?, Clip::norm(2.0));
    assert_eq!(Clip::chain([])?, Clip::none());
    assert_eq!(
        "value:1e+3+norm:+inf".parse::<Clip>()?,
        Clip::chain([Clip::value(1e3), Clip::norm(f64::INFINITY)])?
    );
    let own_eps = "norm:1,eps=0+param-norm:1,eps=0.5";
    assert_eq!(own_eps.parse::<Clip>()?.to_string(), own_eps);
    Ok(())
}

#[test]
fn what_can_not_follow_says_why() {
    for (text, expected) in [
        ("norm:1+norm:2", "`norm` comes twice"),
        (
            "norm:1+value:1",
            "`value` after `norm` would need another read of the gradients: put `value` first",
        ),
        ("skip:z=1,max_norm=1+value:1", "`value` after `skip`"),
        ("agc+value:1", "`value` after `agc`"),
        (
            "value:1+agc",
            "the norms of `agc`'s units after `value` are not measured",
        ),
        (
            "norm:1,norm_type=1+value:1,norm_type=inf",
            "norm_type holds for the whole chain",
        ),
        ("norm:1+", "no method is named ``"),
        ("value:1+nrom:1", "no method is named `nrom`"),
    ] {
        let error = text.parse::<Clip>().unwrap_err();
        assert!(matches!(error, Error::InvalidClip { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{text}: {error}");
    }
    let error = "value:1+norm:0".parse::<Clip>().unwrap_err();
    assert!(error.to_string().starts_with("max_norm is 0"), "{error}");
}
