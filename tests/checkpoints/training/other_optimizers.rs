//! Of candle's own optimizers all is restored but their moments, of which a warning tells. Of a pair
//! of ours all is restored.

use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Var};
use candle_grad_clip::optim::{self, Pair, ParamGroup, ParamGroups, ParamsSgd};
use candle_grad_clip::{Checkpoints, Clip, ClippedOptimizer, Error, LossScaler, NamedVars};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD, VarMap};
use support::checkpoints::Folder;
use support::events::{events, of_level};
use support::gradients::bits_of_vars;
use tracing::Level;

use super::map_of;

fn map() -> Result<VarMap> {
    map_of(&[("a", &[3], DType::F32), ("b", &[2], DType::F64)])
}

fn wrapped<O: Optimizer + 'static>(
    inner: O,
    map: &VarMap,
    clip: &str,
) -> Result<ClippedOptimizer<O>> {
    let opt = ClippedOptimizer::wrap(inner, map, clip.parse()?)?;
    Ok(opt.with_loss_scaler(LossScaler::default().init_scale(4.0).growth_interval(2))?)
}

fn step<O: Optimizer + 'static>(opt: &mut ClippedOptimizer<O>, factor: f64) -> Result<f64> {
    let vars: Vec<Var> = opt.vars().vars().to_vec();
    let sum = (vars[0].sqr()?.sum_all()?.to_dtype(DType::F64)? + vars[1].sqr()?.sum_all()?)?;
    let report = opt.backward_step_report(&(sum * factor)?)?;
    Ok(report.clip_coef()?)
}

fn adamw(map: &VarMap) -> Result<AdamW> {
    Ok(AdamW::new(
        map.all_vars(),
        ParamsAdamW {
            lr: 0.1 + 0.2,
            ..Default::default()
        },
    )?)
}

/// Saves after three steps with candle's `AdamW`, one of them skipped.
fn saved(dir: &Path) -> Result<(VarMap, ClippedOptimizer<AdamW>)> {
    let map = map()?;
    let mut opt = wrapped(adamw(&map)?, &map, "auto:50")?;
    for factor in [1.0, f64::INFINITY, 2.0] {
        step(&mut opt, factor)?;
    }
    opt.set_learning_rate(0.1);
    Checkpoints::in_dir(dir)?.save(3, &map, &opt, &"state")?;
    Ok((map, opt))
}

#[test]
fn load_latest_restores_the_wrapper_of_candles_adamw_and_warns() -> Result<()> {
    let folder = Folder::in_memory()?;
    let (_, mut old) = saved(&folder)?;
    let mut map = map()?;
    let mut opt = wrapped(adamw(&map)?, &map, "norm:7")?;
    let seen = events(|| {
        let loaded = Checkpoints::in_dir(&*folder)?
            .load_latest(&mut map, &mut opt)?
            .unwrap();
        assert_eq!(
            (loaded.step(), loaded.state::<String>()?),
            (3, "state".to_string())
        );
        Ok(())
    })?;
    let warnings = of_level(&seen, Level::WARN);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].0["optimizer"].contains("candle_nn::optim::AdamW"),
        "{warnings:?}"
    );
    assert!(
        warnings[0].0["message"].contains("(moments, step counter) can't be saved"),
        "{warnings:?}"
    );

    assert_eq!(opt.clip(), &"auto:50".parse::<Clip>()?);
    assert_eq!(opt.learning_rate(), 0.1);
    assert_eq!(opt.steps_taken()?, 2);
    assert_eq!(opt.loss_scaler(), old.loss_scaler());
    let scale = opt.loss_scaler().map(LossScaler::current_scale);
    assert_eq!(scale, Some(2.0)); // halved once
    // The next coefficients come from the history, which is the same; and so are the weights.
    assert_eq!(step(&mut opt, 50.0)?, step(&mut old, 50.0)?);
    assert_eq!(opt.last_report().unwrap().step(), 4);
    Ok(())
}

#[test]
fn load_latest_tells_candles_optimizers_apart() -> Result<()> {
    let folder = Folder::in_memory()?;
    saved(&folder)?;
    let checkpoints = Checkpoints::in_dir(&*folder)?;
    let map = map()?;
    let mut sgd = wrapped(SGD::new(map.all_vars(), 0.5)?, &map, "norm:7")?;
    let error = checkpoints
        .load_latest(&map, &mut sgd)
        .unwrap_err()
        .to_string();
    let (there, here) = ("candle_nn::optim::AdamW", "candle_nn::optim::SGD");
    assert!(
        error.ends_with(&format!(
            "the optimizer is {there} in the file, {here} here"
        )),
        "{error}"
    );
    let fused = optim::AdamW::from_named_vars(&map, ParamsAdamW::default())?;
    let mut fused = wrapped(fused, &map, "norm:7")?;
    let error = checkpoints
        .load_latest(&map, &mut fused)
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with(&format!("the optimizer is {there} in the file, AdamW here")),
        "{error}"
    );
    assert_eq!((sgd.learning_rate(), sgd.clip()), (0.5, &Clip::norm(7.0)));
    Ok(())
}

/// Groups with limits of their own belong to the wrapper, so another one is noticed.
#[test]
fn load_latest_names_other_groups_of_candles_optimizers() -> Result<()> {
    let folder = Folder::in_memory()?;
    let map = map()?;
    let with_limit = |max_norm: f64| -> Result<ClippedOptimizer<AdamW>> {
        let groups = ParamGroups::new(vec![ParamGroup::new("first", &["a"]).max_norm(max_norm)])?;
        Ok(wrapped(adamw(&map)?, &map, "norm:7")?.with_param_groups(groups)?)
    };
    let checkpoints = Checkpoints::in_dir(&*folder)?;
    checkpoints.save(1, &map, &with_limit(1.0)?, &())?;
    checkpoints.load_latest(&map, &mut with_limit(1.0)?)?;
    let error = checkpoints
        .load_latest(&map, &mut with_limit(2.0)?)
        .unwrap_err();
    assert!(matches!(error, Error::CheckpointMismatch { .. }), "{error}");
    assert!(error.to_string().contains("groups are [first"), "{error}");
    Ok(())
}

#[test]
fn load_latest_restores_both_of_a_pair() -> Result<()> {
    let folder = Folder::in_memory()?;
    let pair = |map: &VarMap| -> Result<ClippedOptimizer<_>> {
        let vars = NamedVars::from(map);
        let named = vars
            .names()
            .iter()
            .cloned()
            .zip(vars.vars().iter().cloned());
        let (a, b): (Vec<(String, Var)>, Vec<_>) = named.partition(|(name, _)| name == "a");
        let momentum = ParamsSgd {
            lr: 0.1,
            momentum: 0.9,
            ..ParamsSgd::default()
        };
        let sgd = optim::Sgd::from_named_vars(a.clone(), momentum)?;
        let adamw = optim::AdamW::from_named_vars(b.clone(), ParamsAdamW::default())?;
        wrapped(Pair::new(sgd, a, adamw, b)?, map, "stabilizer")
    };
    let (one, mut two) = (map()?, map()?);
    let mut opt = pair(&one)?;
    let checkpoints = Checkpoints::in_dir(&*folder)?;
    for at in 0..4 {
        step(&mut opt, 1.0 + f64::from(at))?;
        if at == 1 {
            checkpoints.save(2, &one, &opt, &())?;
        }
    }
    let mut resumed = pair(&two)?;
    let seen = events(|| {
        checkpoints.load_latest(&mut two, &mut resumed)?.unwrap();
        Ok(())
    })?;
    assert!(of_level(&seen, Level::WARN).is_empty(), "{seen:?}");
    for at in 2..4 {
        step(&mut resumed, 1.0 + f64::from(at))?;
    }
    let bits = |map: &VarMap| bits_of_vars(NamedVars::from(map).vars());
    assert_eq!(bits(&two)?, bits(&one)?);
    assert_eq!(resumed.inner().second().steps(), 4);
    Ok(())
}
