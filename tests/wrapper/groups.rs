//! Parameter groups: learning rate, weight decay and limit by name, one global norm over all.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::optim::{AdamW, GroupedOptimizer, ParamGroup, ParamGroups, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NamedVars, NonFinite, NormType};
use candle_nn::{Optimizer, ParamsAdamW, SGD};
use support::checkpoints::Folder;
use support::device::backends;
use support::gradients::{
    all_values, bits_of_vars, random_values, store_for, tensor, values, without_names,
};
use support::oracle;

pub(super) const NAMES: [&str; 4] = ["embed.weight", "fc.weight", "fc.bias", "head.weight"];

pub(super) fn named(dtype: DType) -> Result<Vec<(String, Var)>> {
    let var = |(name, i): (&&str, u64)| -> Result<(String, Var)> {
        let start = tensor(&random_values(6, 50 + i), (2, 3), dtype)?;
        Ok(((*name).to_string(), Var::from_tensor(&start)?))
    };
    NAMES.iter().zip(0..).map(var).collect()
}

pub(super) fn gradients(step: u64, dtype: DType) -> Result<Vec<Tensor>> {
    (0..4)
        .map(|i| {
            Ok(tensor(
                &random_values(6, 1000 + 10 * step + i),
                (2, 3),
                dtype,
            )?)
        })
        .collect()
}

fn groups() -> Result<ParamGroups> {
    Ok(ParamGroups::new(vec![
        ParamGroup::new("no_decay", &["*.bias", "embed*"]).weight_decay(0.0),
        // The first group that matches counts: the embedding stays in the one above.
        ParamGroup::new("slow", &["embed.weight", "head.?eight"]).lr_scale(0.25),
    ])?)
}

pub(super) fn params() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.02,
        weight_decay: 0.5,
        ..ParamsAdamW::default()
    }
}

/// candle's AdamW, one a group, is the oracle.
#[test]
fn groups_of_a_fused_optimizer_are_an_optimizer_of_candles_for_each() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let (a, b, c) = (named(dtype)?, named(dtype)?, named(dtype)?);
        let mut theirs = GroupedOptimizer::new(a.clone(), &groups()?, 0.02, |vars, group, lr| {
            let weight_decay = group.map_or(0.5, |group| group.weight_decay_or(0.5));
            candle_nn::AdamW::new(
                vars,
                ParamsAdamW {
                    lr,
                    weight_decay,
                    ..params()
                },
            )
        })?;
        let mut alone = AdamW::from_named_vars(b.clone(), params())?.with_param_groups(groups()?)?;
        // From Vars in another order, and without names.
        let mut turned = without_names(&c);
        turned.reverse();
        let wrapped = AdamW::new(turned, params())?;
        let mut wrapped = ClippedOptimizer::wrap(wrapped, c.clone(), Clip::norm(1e9))?
            .with_param_groups(groups()?)?;
        for step in 0..30 {
            if step == 10 {
                theirs.set_learning_rate(0.01);
                alone.set_learning_rate(0.01);
                wrapped.set_learning_rate(0.01);
            }
            let gradients = gradients(step, dtype)?;
            theirs.step(&store_for(&without_names(&a), &gradients))?;
            alone.step(&store_for(&without_names(&b), &gradients))?;
            wrapped.step(&store_for(&without_names(&c), &gradients))?;
            let expected = bits_of_vars(&without_names(&a))?;
            assert_eq!(
                bits_of_vars(&without_names(&b))?,
                expected,
                "{dtype:?} {step}"
            );
            assert_eq!(
                bits_of_vars(&without_names(&c))?,
                expected,
                "{dtype:?} {step}"
            );
        }
        assert_eq!(theirs.learning_rate(), 0.01);
    }
    Ok(())
}

fn limited() -> Result<ParamGroups> {
    Ok(ParamGroups::new(vec![
        ParamGroup::new("embedding", &["embed*"]).max_norm(0.125),
        ParamGroup::new("fc", &["fc.*"]).max_norm(1e6),
    ])?)
}

/// What the gradients become, by the plain equation, and the coefficient of each Var.
fn by_hand(gradients: &[Tensor], max_norm: f64, p: f64) -> Result<(Vec<Vec<f64>>, Vec<f64>)> {
    let norm = |part: &[Tensor]| -> Result<f64> { Ok(oracle::norm(&all_values(part)?, p)) };
    let all = oracle::clip_coef(norm(gradients)?, max_norm, 1e-6);
    let embedding = oracle::clip_coef(norm(&gradients[..1])?, 0.125, 1e-6).min(all);
    let coefs = vec![embedding, all, all, all];
    let mut clipped = Vec::new();
    for (gradient, coef) in gradients.iter().zip(&coefs) {
        clipped.push(values(gradient)?.into_iter().map(|x| x * coef).collect());
    }
    Ok((clipped, coefs))
}

#[test]
fn a_group_limit_holds_beside_the_limit_of_all() -> Result<()> {
    let dtype = DType::F64;
    for backend in backends() {
        for norm_type in [NormType::L2, NormType::L1, NormType::Inf, NormType::P(3.0)] {
            for max_norm in [0.05, 1.0, 1e6] {
                for fused in [false, true] {
                    let named = named(dtype)?;
                    let start = all_values(
                        &without_names(&named)
                            .iter()
                            .map(|v| v.detach())
                            .collect::<Vec<_>>(),
                    )?;
                    let gradients = gradients(3, dtype)?;
                    let store = store_for(&without_names(&named), &gradients);
                    let clip = Clip::norm(max_norm).norm_type(norm_type);
                    let report = backend::with_backend(backend, || -> Result<_> {
                        Ok(if fused {
                            let opt = Sgd::new_lr(without_names(&named), 1.0)?;
                            ClippedOptimizer::wrap(opt, named.clone(), clip)?
                                .with_param_groups(limited()?)?
                                .step_report(&store)?
                        } else {
                            let opt = SGD::new(without_names(&named), 1.0)?;
                            ClippedOptimizer::wrap(opt, named.clone(), clip)?
                                .with_param_groups(limited()?)?
                                .step_report(&store)?
                        })
                    })?;
                    let (clipped, coefs) = by_hand(&gradients, max_norm, norm_type.p())?;
                    let after = all_values(
                        &without_names(&named)
                            .iter()
                            .map(|v| v.detach())
                            .collect::<Vec<_>>(),
                    )?;
                    let what = format!("{backend:?} {norm_type} {max_norm} {fused}");
                    for ((before, after), step) in start.iter().zip(&after).zip(clipped.concat()) {
                        assert!((before - step - after).abs() < 1e-12, "{what}");
                    }
                    let of_groups: Vec<f64> = report
                        .record()?
                        .groups
                        .iter()
                        .map(|g| g.clip_coef)
                        .collect();
                    assert!((of_groups[0] - coefs[0]).abs() < 1e-12, "{what}");
                    assert!((of_groups[1] - coefs[1]).abs() < 1e-12, "{what}");
                    let norm = oracle::norm(&clipped.concat(), norm_type.p());
                    assert!(
                        (report.record()?.clipped_norm / norm - 1.0).abs() < 1e-9,
                        "{what}"
                    );
                    assert!(report.was_clipped()?, "{what}");
                    assert_eq!(report.record()?.groups[0].name, "embedding");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn groups_without_a_limit_that_is_reached_change_no_bit() -> Result<()> {
    let (a, b) = (named(DType::F32)?, named(DType::F32)?);
    let wide = ParamGroups::new(vec![ParamGroup::new("all", &["*"]).max_norm(1e6)])?;
    let opt = |named: &[(String, Var)]| SGD::new(without_names(named), 0.5);
    let mut plain = ClippedOptimizer::wrap(opt(&a)?, a.clone(), Clip::norm(1.0))?;
    let mut grouped =
        ClippedOptimizer::wrap(opt(&b)?, b.clone(), Clip::norm(1.0))?.with_param_groups(wide)?;
    for step in 0..5 {
        let gradients = gradients(step, DType::F32)?;
        let x = plain.step_report(&store_for(&without_names(&a), &gradients))?;
        let y = grouped.step_report(&store_for(&without_names(&b), &gradients))?;
        assert_eq!(x.clip_coef()?, y.record()?.groups[0].clip_coef);
        assert_eq!(
            bits_of_vars(&without_names(&a))?,
            bits_of_vars(&without_names(&b))?
        );
    }
    Ok(())
}

#[test]
fn non_finite_policies_hold_in_groups() -> Result<()> {
    let named = named(DType::F64)?;
    let mut bad = gradients(0, DType::F64)?;
    bad[1] = (&bad[1] / 0.0)?;
    let store = store_for(&without_names(&named), &bad);
    let make = |policy| -> Result<_> {
        let opt = Sgd::new_lr(without_names(&named), 0.5)?;
        let clip = Clip::norm(1.0).non_finite(policy);
        Ok(ClippedOptimizer::wrap(opt, named.clone(), clip)?.with_param_groups(limited()?)?)
    };
    let report = make(NonFinite::SkipStep)?.step_report(&store)?;
    assert!(report.skipped()? && report.record()?.groups.is_empty());
    let report = make(NonFinite::Zero)?.step_report(&store)?;
    let finite = [0, 2, 3].map(|i| bad[i].clone());
    let norm = oracle::norm(&all_values(&finite)?, 2.0);
    assert!((report.total_norm()? / norm - 1.0).abs() < 1e-12);
    assert!(report.record()?.clipped_norm < 1.0);
    for (_, var) in &named {
        assert!(values(var)?.iter().all(|x| x.is_finite()));
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_by_name() -> Result<()> {
    let named = named(DType::F32)?;
    let group = |pattern: &str| ParamGroup::new("g", &[pattern]);
    let groups = |group| ParamGroups::new(vec![group]);
    assert!(groups(group("*").max_norm(0.0)).is_err());
    assert!(groups(group("*").lr_scale(f64::NAN)).is_err());
    assert!(groups(group("*").weight_decay(-1.0)).is_err());

    let typo = groups(group("fc.wieght").weight_decay(0.0))?;
    let error = AdamW::from_named_vars(named.clone(), params())?
        .with_param_groups(typo)
        .unwrap_err();
    assert!(
        matches!(&error, Error::UnmatchedPattern { pattern, .. } if pattern == "fc.wieght"),
        "{error}"
    );
    assert!(error.to_string().contains("embed.weight"), "{error}");

    let limit = groups(group("*").max_norm(1.0))?;
    let error = AdamW::from_named_vars(named.clone(), params())?
        .with_param_groups(limit.clone())
        .unwrap_err();
    assert!(error.to_string().contains("ClippedOptimizer"), "{error}");

    let sgd = || SGD::new(without_names(&named), 0.1);
    let slow = groups(group("*").lr_scale(0.5))?;
    let opt = ClippedOptimizer::wrap(sgd()?, named.clone(), Clip::norm(1.0))?;
    let error = opt.with_param_groups(slow).unwrap_err();
    assert!(matches!(error, Error::GroupsNeedFused { .. }), "{error}");
    assert!(error.to_string().contains("GroupedOptimizer"), "{error}");

    let opt = ClippedOptimizer::wrap(sgd()?, named.clone(), Clip::value(1.0))?;
    assert!(opt.with_param_groups(limit.clone()).is_err());
    let opt = ClippedOptimizer::wrap(sgd()?, named.clone(), Clip::norm(1.0))?;
    let mut opt = opt.with_param_groups(limit)?;
    assert!(opt.set_clip(Clip::value(1.0)).is_err());
    assert_eq!(opt.clip(), &Clip::norm(1.0));
    Ok(())
}

#[test]
fn a_frozen_group_does_not_move() -> Result<()> {
    let named = NamedVars::from(named(DType::BF16)?);
    let before = bits_of_vars(named.vars())?;
    let groups = ParamGroups::new(vec![
        ParamGroup::new("frozen", &["fc.*"])
            .lr_scale(0.0)
            .weight_decay(0.0),
    ])?;
    let opt = AdamW::from_named_vars(named.clone(), params())?.master_weights(true);
    let mut opt =
        ClippedOptimizer::wrap(opt, named.clone(), Clip::norm(1.0))?.with_param_groups(groups)?;
    for step in 0..3 {
        opt.step(&store_for(named.vars(), &gradients(step, DType::BF16)?))?;
    }
    let after = bits_of_vars(named.vars())?;
    assert_eq!(before[1..3], after[1..3]);
    assert_ne!(before[0], after[0]);
    assert_ne!(before[3], after[3]);
    Ok(())
}

#[test]
fn a_checkpoint_is_of_its_groups() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("optimizer.safetensors");
    let make = |groups| -> Result<(Vec<Var>, ClippedOptimizer<AdamW>)> {
        let named = named(DType::F32)?;
        let opt = AdamW::from_named_vars(named.clone(), params())?;
        let opt = ClippedOptimizer::wrap(opt, named.clone(), Clip::norm(1.0))?
            .with_param_groups(groups)?;
        Ok((without_names(&named), opt))
    };
    let (a, mut opt) = make(groups()?)?;
    for step in 0..3 {
        opt.step(&store_for(&a, &gradients(step, DType::F32)?))?;
    }
    opt.save(&path)?;
    let (b, mut resumed) = make(groups()?)?;
    for (a, b) in a.iter().zip(&b) {
        b.set(a)?;
    }
    resumed.load(&path)?;
    for step in 3..6 {
        let gradients = gradients(step, DType::F32)?;
        opt.step(&store_for(&a, &gradients))?;
        resumed.step(&store_for(&b, &gradients))?;
        assert_eq!(bits_of_vars(&a)?, bits_of_vars(&b)?);
    }
    let (_, mut other) = make(limited()?)?;
    let error = other.load(&path).unwrap_err();
    assert!(matches!(error, Error::CheckpointMismatch { .. }), "{error}");
    assert!(error.to_string().contains("no_decay"), "{error}");
    Ok(())
}
