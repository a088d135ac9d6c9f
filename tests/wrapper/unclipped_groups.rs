//! Groups without clipping: they count in no norm, and are not clipped.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::{ParamGroup, ParamGroups, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, LossScaler, NonFinite};
use candle_nn::{Optimizer, SGD};
use support::gradients::{store_for, tensor, values, without_names};

use super::groups::{NAMES, named};

/// The fused path and the other, with and without a loss scale.
fn step_without_clipping(
    gradients: &[Tensor],
    clip: &Clip,
    fused: bool,
    scaler: Option<LossScaler>,
) -> Result<(Vec<Vec<f64>>, candle_grad_clip::StepReport)> {
    let named: Vec<(String, Var)> = gradients
        .iter()
        .zip(NAMES)
        .map(|(gradient, name)| Ok((name.to_string(), Var::from_tensor(&gradient.zeros_like()?)?)))
        .collect::<Result<_>>()?;
    let vars = without_names(&named);
    let groups = ParamGroups::new(vec![
        ParamGroup::new("matrices", &["fc.*"]).no_clip(),
        ParamGroup::new("head", &["head.*"]),
    ])?;
    let scale = scaler.as_ref().map_or(1.0, LossScaler::current_scale);
    let scaled = gradients.iter().map(|gradient| gradient * scale);
    let store = store_for(&vars, &scaled.collect::<candle_core::Result<Vec<_>>>()?);
    let report = if fused {
        let opt = ClippedOptimizer::wrap(
            Sgd::from_named_vars(named.clone(), 1.0)?,
            named,
            clip.clone(),
        )?;
        let mut opt = opt.with_param_groups(groups)?.with_param_norms(true);
        if let Some(scaler) = scaler {
            opt = opt.with_loss_scaler(scaler)?;
        }
        opt.step_report(&store)?
    } else {
        let opt = ClippedOptimizer::wrap(SGD::new(vars.clone(), 1.0)?, named, clip.clone())?;
        let mut opt = opt.with_param_groups(groups)?.with_param_norms(true);
        if let Some(scaler) = scaler {
            opt = opt.with_loss_scaler(scaler)?;
        }
        opt.step_report(&store)?
    };
    // A step of 1 from 0: what was taken off is the gradient.
    let steps = vars.iter().map(|var| -> Result<Vec<f64>> {
        let values = values(var)?;
        Ok(values.into_iter().map(|value| -value).collect())
    });
    Ok((steps.collect::<Result<_>>()?, report))
}

#[test]
fn a_group_without_clipping_counts_in_no_norm_and_is_not_clipped() -> Result<()> {
    let one = |values: &[f64]| tensor(values, values.len(), DType::F64);
    let gradients = [
        one(&[3.0])?,
        one(&[60.0, -80.0])?,
        one(&[0.0])?,
        one(&[4.0])?,
    ];
    for scaled in [false, true] {
        for fused in [false, true] {
            let step = |clip: &Clip| {
                let scaler = scaled.then(|| LossScaler::default().init_scale(1024.0));
                step_without_clipping(&gradients, clip, fused, scaler)
            };
            // The norm is that of 3 and 4.
            for (clip, embed, head) in [
                (Clip::norm(2.5), 1.5, 2.0),
                (Clip::norm(5.0), 3.0, 4.0),
                (Clip::value(1.0), 1.0, 1.0),
                (Clip::param_norm(2.0), 2.0, 2.0),
                (Clip::skip_above_norm(50.0), 3.0, 4.0),
            ] {
                let (steps, report) = step(&clip.clone().eps(0.0))?;
                let what = format!("{clip} fused {fused} scaled {scaled} {report:?}");
                assert_eq!(
                    steps,
                    [vec![embed], vec![60.0, -80.0], vec![0.0], vec![head]],
                    "{what}"
                );
                assert_eq!(report.total_norm()?, 5.0, "{what}");
                let clipped = report.record()?.clipped_norm;
                assert!((clipped - embed.hypot(head)).abs() < 1e-12, "{what}");
                let (matrices, head_group) =
                    (&report.record()?.groups[0], &report.record()?.groups[1]);
                assert_eq!(
                    (matrices.total_norm, matrices.clip_coef),
                    (100.0, 1.0),
                    "{what}"
                );
                assert_eq!(head_group.total_norm, 4.0, "{what}");
                assert_eq!(
                    report.record()?.largest_param_norms(1),
                    [("fc.weight", 100.0)],
                    "{what}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn what_is_not_finite_in_a_group_without_clipping_is_seen() -> Result<()> {
    let one = |values: &[f64]| tensor(values, values.len(), DType::F64);
    let gradients = [
        one(&[3.0])?,
        one(&[f64::NAN, 1.0])?,
        one(&[0.0])?,
        one(&[4.0])?,
    ];
    for fused in [false, true] {
        let step = |policy| {
            let clip = Clip::norm(2.5).eps(0.0).non_finite(policy);
            step_without_clipping(&gradients, &clip, fused, None)
        };
        let (steps, report) = step(NonFinite::SkipStep)?;
        assert!(report.skipped()?);
        assert_eq!(steps[0], [0.0]);
        let error = step(NonFinite::Error).unwrap_err().to_string();
        assert!(error.contains("fc.weight"), "{error}");
        let (steps, _) = step(NonFinite::Zero)?;
        assert_eq!(steps, [vec![1.5], vec![0.0, 1.0], vec![0.0], vec![2.0]]);
        let (steps, _) = step(NonFinite::Propagate)?;
        assert_eq!((steps[0][0], steps[3][0]), (1.5, 2.0));
        assert!(steps[1][0].is_nan());
    }
    Ok(())
}

#[test]
fn a_group_without_clipping_is_refused_where_it_says_nothing() -> Result<()> {
    let group = || ParamGroup::new("body", &["fc.*"]).no_clip();
    assert_eq!(group().to_string(), "body (fc.*) no_clip");
    let error = ParamGroups::new(vec![group().max_norm(1.0)]).unwrap_err();
    assert!(error.to_string().contains("no_clip"), "{error}");
    let groups = ParamGroups::new(vec![group()])?;
    let named = named(DType::F32)?;
    let error = Sgd::from_named_vars(named.clone(), 0.1)?
        .with_param_groups(groups.clone())
        .unwrap_err();
    assert!(error.to_string().contains("clips nothing"), "{error}");
    let sgd = || Sgd::from_named_vars(named.clone(), 0.1);
    let opt = ClippedOptimizer::wrap(sgd()?, named.clone(), Clip::agc())?;
    let error = opt.with_param_groups(groups.clone()).unwrap_err();
    assert!(error.to_string().contains("exclude"), "{error}");
    let opt = ClippedOptimizer::wrap(sgd()?, named.clone(), Clip::norm(1.0))?;
    let mut opt = opt.with_param_groups(groups)?;
    assert!(opt.set_clip(Clip::agc()).is_err());
    assert_eq!(opt.clip(), &Clip::norm(1.0));
    Ok(())
}
