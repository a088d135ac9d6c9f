//! `optim::Pair`: two optimizers over different Vars, one global norm.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Pair, PairConfig, ParamGroup, ParamGroups, Sgd};
use candle_grad_clip::{
    Clip, ClippedConfig, ClippedOptimizer, Error, LossScaler, NonFinite, StepPath, clip_grad_norm,
};
use candle_nn::{Optimizer, ParamsAdamW, SGD};
use support::checkpoints::{Folder, edited};
use support::device::on_every_backend;
use support::gradients::{
    all_values_of_vars, bits_of_vars, loss_with_gradients, store_for, without_names,
};
use support::optimizers::{MomentumSgd, ParamsMomentumSgd};
use support::oracle::{assert_all_close, assert_close};

use super::groups::{gradients, named, params};

type Named = Vec<(String, Var)>;

/// The Vars, and which of them each optimizer trains.
fn split(dtype: DType) -> Result<(Named, Named, Named)> {
    let all = named(dtype)?;
    let (first, second) = (
        all[1..3].to_vec(),
        [all[0].clone(), all[3].clone()].to_vec(),
    );
    Ok((all, first, second))
}

fn fused(dtype: DType) -> Result<(Named, Pair<Sgd, AdamW>)> {
    let (all, first, second) = split(dtype)?;
    let sgd = Sgd::from_named_vars(first.clone(), 0.1)?;
    let adamw = AdamW::from_named_vars(second.clone(), params())?;
    Ok((all, Pair::new(sgd, first, adamw, second)?))
}

fn of_candle(dtype: DType) -> Result<(Named, Pair<SGD, candle_nn::AdamW>)> {
    let (all, first, second) = split(dtype)?;
    let sgd = SGD::new(without_names(&first), 0.1)?;
    let adamw = candle_nn::AdamW::new(without_names(&second), params())?;
    Ok((all, Pair::new(sgd, first, adamw, second)?))
}

/// Four steps, by `backward_step` and `step` in turn. Returns the weights' bits.
fn run<O: Optimizer + 'static>(
    (all, inner): (Named, O),
    clip: Clip,
    path: [StepPath; 2],
) -> Result<Vec<Vec<u64>>> {
    let vars = without_names(&all);
    let mut opt = ClippedOptimizer::wrap(inner, all, clip)?;
    for at in 0..4 {
        let gradients = gradients(at, vars[0].dtype())?;
        let report = if at % 2 == 0 {
            opt.backward_step_report(&loss_with_gradients(&vars, &gradients)?)?
        } else {
            opt.step_report(&store_for(&vars, &gradients))?
        };
        assert_eq!(report.path(), path[at as usize % 2]);
        assert!(report.was_clipped()?);
    }
    Ok(bits_of_vars(&vars)?)
}

const IN_PLACE: [StepPath; 2] = [StepPath::InPlace, StepPath::Copied];
const FUSED: [StepPath; 2] = [StepPath::Fused; 2];

#[test]
fn a_fused_pair_has_the_bits_of_candles_optimizers() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        for clip in ["norm:0.5", "value:0.5", "adagc", "param-norm:0.1"] {
            let clip: Clip = clip.parse()?;
            let right = run(of_candle(dtype)?, clip.clone(), IN_PLACE)?;
            assert_eq!(run(fused(dtype)?, clip.clone(), FUSED)?, right, "{clip}");
        }
    }
    Ok(())
}

/// Clipping by hand, then a step of each.
#[test]
fn any_two_optimizers_share_one_norm() -> Result<()> {
    on_every_backend(|| {
        let (all, first, second) = split(DType::F32)?;
        let config = ParamsMomentumSgd {
            lr: 0.1,
            momentum: 0.9,
        };
        let momentum =
            |vars: &[(String, Var)]| MomentumSgd::new(without_names(vars), config.clone());
        let adamw = |vars: &[(String, Var)]| candle_nn::AdamW::new(without_names(vars), params());
        let pair = Pair::new(momentum(&first)?, first.clone(), adamw(&second)?, second)?;
        let ours = run((all, pair), Clip::norm(0.5), IN_PLACE)?;

        let (all, first, second) = split(DType::F32)?;
        let (mut momentum, mut adamw) = (momentum(&first)?, adamw(&second)?);
        let vars = without_names(&all);
        for at in 0..4 {
            let mut grads = store_for(&vars, &gradients(at, DType::F32)?);
            clip_grad_norm(&mut grads, &vars, 0.5)?;
            momentum.step(&grads)?;
            adamw.step(&grads)?;
        }
        assert_eq!(ours, bits_of_vars(&vars)?);
        Ok(())
    })
}

#[test]
fn one_learning_rate_drives_both() -> Result<()> {
    let (all, pair) = fused(DType::F32)?; // rates 0.1 and 0.02
    let mut opt = ClippedOptimizer::wrap(pair, all, Clip::norm(1.0))?;
    assert_eq!(opt.learning_rate(), 0.1);
    for lr in [0.05, 0.0, 0.2] {
        opt.set_learning_rate(lr);
        assert_eq!(opt.learning_rate(), lr);
        assert_close(
            opt.inner().second().learning_rate(),
            lr / 5.0,
            1e-15,
            "second",
        );
    }
    // One alone, until the next of both.
    opt.inner_mut().second_mut().set_learning_rate(7.0);
    assert_eq!(opt.learning_rate(), 0.2);
    opt.set_learning_rate(0.1);
    assert_close(opt.inner().second().learning_rate(), 0.02, 1e-15, "second");
    for (first, second) in [(0.0, 0.1), (f64::NAN, 0.1), (0.1, -1.0), (0.1, f64::NAN)] {
        let sgd = |lr| SGD::new(vec![], lr);
        let none = Vec::<Var>::new;
        let error = Pair::new(sgd(first)?, none(), sgd(second)?, none()).unwrap_err();
        assert!(
            error.to_string().contains("optimizer's learning rate"),
            "{error}"
        );
    }
    Ok(())
}

#[test]
fn an_invalid_rate_of_the_second_changes_neither() -> Result<()> {
    fn check<A: Optimizer + 'static, B: Optimizer + 'static>(
        (all, mut pair): (Named, Pair<A, B>),
    ) -> Result<()> {
        pair.second_mut().set_learning_rate(f64::NAN);
        let vars = without_names(&all);
        let before = bits_of_vars(&vars)?;
        let mut opt = ClippedOptimizer::wrap(pair, all, Clip::norm(1.0))?;
        let grads = store_for(&vars, &gradients(0, DType::F32)?);
        let error = opt.step_report(&grads).unwrap_err();
        assert!(error.to_string().contains("NaN"), "{error}");
        assert_eq!(bits_of_vars(&vars)?, before);
        Ok(())
    }
    check(fused(DType::F32)?)?;
    check(of_candle(DType::F32)?)
}

#[test]
fn a_skipped_step_leaves_both_as_they_are() -> Result<()> {
    let (all, pair) = fused(DType::F32)?;
    let vars = without_names(&all);
    let mut opt = ClippedOptimizer::wrap(pair, all, Clip::norm(1.0))?;
    let mut bad = gradients(0, DType::F32)?;
    bad[3] = (&bad[3] * f64::NAN)?; // of the second optimizer
    let before = bits_of_vars(&vars)?;
    assert!(opt.step_report(&store_for(&vars, &bad))?.skipped()?);
    assert_eq!(bits_of_vars(&vars)?, before);
    let pair = opt.inner();
    assert_eq!((pair.first().steps(), pair.second().steps()), (0, 0));
    opt.set_clip(Clip::norm(1.0).non_finite(NonFinite::Error))?;
    let error = opt.step_report(&store_for(&vars, &bad)).unwrap_err();
    assert!(error.to_string().contains("head.weight"), "{error}");
    Ok(())
}

#[test]
fn vars_that_only_one_side_has_are_refused() -> Result<()> {
    let (all, pair) = fused(DType::F32)?;
    let error = ClippedOptimizer::wrap(pair, all[..3].to_vec(), Clip::norm(1.0)).unwrap_err();
    assert!(
        matches!(&error, Error::UnclippedVars { vars } if vars == &["head.weight"]),
        "{error}"
    );
    // Another pair that trains less is put in.
    let (all, pair) = fused(DType::F32)?;
    let mut opt = ClippedOptimizer::wrap(pair, all.clone(), Clip::norm(1.0))?;
    *opt.inner_mut().second_mut() = AdamW::from_named_vars(all[..1].to_vec(), params())?;
    let grads = store_for(&without_names(&all), &gradients(0, DType::F32)?);
    let error = opt.step_report(&grads).unwrap_err();
    assert!(
        matches!(&error, Error::UntrainedVars { vars } if vars == &["head.weight"]),
        "{error}"
    );
    Ok(())
}

#[test]
fn groups_have_limits_at_the_wrapper_and_rates_at_each_optimizer() -> Result<()> {
    let folder = Folder::in_memory()?;
    let groups = |group: ParamGroup| ParamGroups::new(vec![group]);
    let (all, pair) = fused(DType::F32)?;
    let opt = ClippedOptimizer::wrap(pair, all, Clip::none())?;
    let slow = groups(ParamGroup::new("slow", &["fc.*"]).lr_scale(0.5))?;
    let error = opt.with_param_groups(slow).unwrap_err();
    assert!(matches!(error, Error::GroupsNeedFused { .. }), "{error}");

    let (all, first, second) = split(DType::F32)?;
    let frozen = groups(ParamGroup::new("frozen", &["fc.bias"]).lr_scale(0.0))?;
    let sgd = Sgd::from_named_vars(first.clone(), 0.1)?.with_param_groups(frozen)?;
    let adamw = AdamW::from_named_vars(second.clone(), ParamsAdamW::default())?;
    let pair = Pair::new(sgd, first, adamw, second)?;
    let limit = groups(ParamGroup::new("matrices", &["*.weight"]).max_norm(0.25))?;
    let vars = without_names(&all);
    let before = bits_of_vars(&vars)?;
    let opt = ClippedOptimizer::wrap(pair, all, Clip::none())?;
    let mut opt = opt.with_param_groups(limit)?;
    let report = opt.step_report(&store_for(&vars, &gradients(0, DType::F32)?))?;
    let record = report.record()?;
    assert_close(
        record.groups[0].clip_coef * record.groups[0].total_norm,
        0.25,
        1e-5,
        "limit",
    );
    let path = folder.join("optimizer.safetensors");
    opt.save(&path)?;
    opt.load(&path)?;
    let other = groups(ParamGroup::new("matrices", &["*.weight"]).max_norm(0.5))?;
    let mut opt = opt.with_param_groups(other)?;
    let error = opt.load(&path).unwrap_err().to_string();
    assert!(error.contains("max_norm 0.25"), "{error}");
    let after = bits_of_vars(&vars)?;
    assert_eq!(after[2], before[2], "fc.bias is frozen");
    assert!([0, 1, 3].iter().all(|i| after[*i] != before[*i]));
    Ok(())
}

/// Steps, a save, one more step; then the same from the file, in a new pair.
#[test]
fn a_saved_pair_ends_with_the_same_bits() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    let (all, pair) = fused(DType::F32)?;
    let vars = without_names(&all);
    let mut opt = ClippedOptimizer::wrap(pair, all, Clip::autoclip(40.0))?;
    for at in 0..3 {
        opt.step(&store_for(&vars, &gradients(at, DType::F32)?))?;
    }
    opt.set_learning_rate(0.05);
    opt.save(&path)?;
    let weights: Vec<Tensor> = vars
        .iter()
        .map(|var| var.copy())
        .collect::<candle_core::Result<_>>()?;
    opt.step(&store_for(&vars, &gradients(3, DType::F32)?))?;

    let (all, pair) = fused(DType::F32)?;
    let resumed_vars = without_names(&all);
    let turned: Named = all.into_iter().rev().collect();
    let mut resumed = ClippedOptimizer::wrap(pair, turned, Clip::none())?;
    resumed.load(&path)?;
    let pair = resumed.inner();
    assert_eq!((pair.first().steps(), pair.second().steps()), (3, 3));
    assert_eq!(resumed.learning_rate(), 0.05);
    assert_close(pair.second().learning_rate(), 0.01, 1e-15, "second");
    assert_eq!(resumed.clip(), &Clip::autoclip(40.0));
    for (var, weight) in resumed_vars.iter().zip(&weights) {
        var.set(weight)?;
    }
    let report = resumed.step_report(&store_for(&resumed_vars, &gradients(3, DType::F32)?))?;
    assert_eq!(report.step(), 4);
    let norm = opt.last_report().unwrap().total_norm()?;
    assert_close(report.total_norm()?, norm, 1e-12, "in another order");
    let (ours, right) = (
        all_values_of_vars(&resumed_vars)?,
        all_values_of_vars(&vars)?,
    );
    assert_all_close(&ours, &right, 1e-6, "resumed");
    // Each by itself, too: under the wrapper's names.
    let one = folder.join("first");
    opt.inner().first().save(&one)?;
    resumed.inner_mut().first_mut().load(&one)?;
    assert_eq!(resumed.inner().first().steps(), 4);
    Ok(())
}

#[test]
fn a_file_that_does_not_fit_a_pair_is_refused() -> Result<()> {
    let folder = Folder::in_memory()?;
    let (of_pair, of_one, of_turned) = (
        folder.join("pair"),
        folder.join("one"),
        folder.join("turned"),
    );
    let wrap = |all: Named, inner| ClippedOptimizer::wrap(inner, all, Clip::norm(1.0));
    let (all, pair) = fused(DType::F32)?;
    let mut opt = wrap(all.clone(), pair)?;
    opt.save(&of_pair)?;
    let mut adamw = ClippedOptimizer::wrap(
        AdamW::from_named_vars(all.clone(), params())?,
        all,
        Clip::norm(1.0),
    )?;
    adamw.save(&of_one)?;
    // The same kinds, and each has the Vars of the other.
    let (all, first, second) = split(DType::F32)?;
    let sgd = Sgd::from_named_vars(second.clone(), 0.1)?;
    let turned = Pair::new(
        sgd,
        second,
        AdamW::from_named_vars(first.clone(), params())?,
        first,
    )?;
    wrap(all, turned)?.save(&of_turned)?;

    let error = |result: candle_grad_clip::Result<()>, expected: &str| {
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::CheckpointMismatch { .. }), "{text}");
        assert!(text.contains(expected), "{text}");
    };
    error(
        opt.load(&of_one),
        "the optimizer is AdamW in the file, a Pair of Sgd and AdamW here",
    );
    error(
        adamw.load(&of_pair),
        "the optimizer is a Pair of Sgd and AdamW in the file, AdamW here",
    );
    error(
        opt.load(&of_turned),
        "Vars of the pair's other optimizer in the file: \"embed.weight\", \"head.weight\", \"fc.weight\"",
    );
    opt.load(&of_pair)?;
    // A file that says nonsense about its optimizers.
    let bytes = std::fs::read(&of_one)?;
    let bad = edited(&bytes, |_, document| {
        document["vars"][0]["is_second"] = true.into();
    })?;
    std::fs::write(&of_one, bad)?;
    let text = adamw.load(&of_one).unwrap_err().to_string();
    assert!(
        text.contains("is of a second optimizer, and there is but one"),
        "{text}"
    );
    Ok(())
}

#[test]
fn a_loss_scale_is_removed_for_both() -> Result<()> {
    let run = |scaler: Option<LossScaler>| -> Result<_> {
        let (all, pair) = fused(DType::F32)?;
        let vars = without_names(&all);
        let mut opt = ClippedOptimizer::wrap(pair, all, Clip::norm(0.5))?;
        if let Some(scaler) = scaler {
            opt = opt.with_loss_scaler(scaler)?;
        }
        for at in 0..3 {
            opt.backward_step(&loss_with_gradients(&vars, &gradients(at, DType::F32)?)?)?;
        }
        Ok(bits_of_vars(&vars)?)
    };
    assert_eq!(run(Some(LossScaler::default()))?, run(None)?);
    Ok(())
}

/// By `Optimizer::new`: a Var that comes twice goes to one of them, once.
#[test]
fn made_from_a_config() -> Result<()> {
    let vars =
        [(2, 2), (1, 3)].map(|shape| Var::ones(shape, DType::F32, support::device::device()));
    let mut vars: Vec<Var> = vars.into_iter().collect::<candle_core::Result<_>>()?;
    vars.push(vars[0].clone());
    let config = PairConfig {
        is_first: |var: &Var| var.dims() == [2, 2],
        first: 0.5.into(),
        second: 0.25,
    };
    let config = ClippedConfig {
        inner: config,
        clip: Clip::none(),
    };
    let mut opt = ClippedOptimizer::<Pair<Sgd, SGD>>::new(vars.clone(), config)?;
    assert_eq!(opt.inner().first().vars().vars().len(), 1);
    opt.backward_step(&(vars[0].sum_all()? + vars[1].sum_all()?)?)?;
    assert_eq!(vars[0].to_vec2::<f32>()?, [[0.5; 2]; 2]);
    assert_eq!(vars[1].to_vec2::<f32>()?, [[0.75; 3]]);
    Ok(())
}
