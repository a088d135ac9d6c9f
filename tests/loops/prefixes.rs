//! `VarBuilder` prefixes: a model of nested parts, whose paths are the names in reports and in the
//! patterns of parameter groups.

use anyhow::Result;
use candle_core::{Tensor, Var};
use candle_grad_clip::optim::{GroupedOptimizer, ParamGroup, ParamGroups, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NamedVars};
use candle_nn::{LayerNorm, Linear, Module, Optimizer, SGD, VarBuilder, VarMap};
use support::gradients::{bits_of_vars, values};
use support::oracle::assert_close;

use super::{EXACT, builder, data, mean, norm_by_hand, start, values_of};

const DIM: usize = 6;

struct Layer {
    norm: LayerNorm,
    fc: [Linear; 2],
}

impl Layer {
    fn new(vb: &VarBuilder) -> candle_core::Result<Self> {
        let linear = |name| candle_nn::linear(DIM, DIM, vb.pp("mlp").pp(name));
        Ok(Self {
            norm: candle_nn::layer_norm_no_bias(DIM, 1e-5, vb.pp("norm"))?, // has a backward pass
            fc: [linear("up")?, linear("down")?],
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.fc[0].forward(&self.norm.forward(x)?)?.tanh()?;
        x + self.fc[1].forward(&y)?
    }
}

struct Model {
    map: VarMap,
    layers: Vec<Layer>,
    head: Linear,
}

impl Model {
    /// Some paths are pushed part by part, some at once: the names are the same.
    fn new() -> Result<Self> {
        let map = VarMap::new();
        let vb = builder(&map);
        let encoder = vb.pp("encoder").pp("layers");
        let decoder = vb.pp("decoder.layers");
        let layers = [encoder.pp(0), encoder.pp(1), decoder.pp("0")];
        let layers = layers
            .iter()
            .map(Layer::new)
            .collect::<candle_core::Result<_>>()?;
        let head = candle_nn::linear(DIM, 1, vb.pp("head"))?;
        start(&map)?;
        Ok(Self { map, layers, head })
    }

    fn loss(&self, step: u64) -> Result<Tensor> {
        let x = data(step % 4, (16, DIM))?;
        let mut y = x.clone();
        for layer in &self.layers {
            y = layer.forward(&y)?;
        }
        let goal = (x.narrow(1, 0, 1)? * x.narrow(1, 1, 1)?)?;
        Ok((self.head.forward(&y)? - goal)?.sqr()?.mean_all()?)
    }
}

/// Slower the deeper, no decay of vectors, and a limit for the head.
fn groups() -> Result<ParamGroups> {
    Ok(ParamGroups::new(vec![
        ParamGroup::new("no_decay", &["*.bias", "*.norm.weight"]).weight_decay(0.0),
        ParamGroup::new("lower", &["encoder.layers.0.*"]).lr_scale(0.25),
        ParamGroup::new("upper", &["encoder.*", "decoder.*"]).lr_scale(0.5),
        ParamGroup::new("head", &["head.*"]).max_norm(0.05),
    ])?)
}

/// `(lr_scale, weight_decay, group)` of a Var, by what its name says.
fn by_hand(name: &str) -> (f64, f64, usize) {
    if name.ends_with("bias") || name.ends_with("norm.weight") {
        (1.0, 0.0, 0)
    } else if name.starts_with("encoder.layers.0.") {
        (0.25, DECAY, 1)
    } else if name.starts_with("head.") {
        (1.0, DECAY, 3)
    } else {
        (0.5, DECAY, 2)
    }
}

const RATE: f64 = 0.2;
const DECAY: f64 = 0.01;
const LIMITS: [f64; 4] = [f64::INFINITY, f64::INFINITY, f64::INFINITY, 0.05];
const LIMIT: f64 = 0.5;

#[test]
fn names_are_the_paths() -> Result<()> {
    let model = Model::new()?;
    let vars = NamedVars::from(&model.map);
    let mut names = Vec::new();
    for layer in ["decoder.layers.0", "encoder.layers.0", "encoder.layers.1"] {
        for name in [
            "mlp.down.bias",
            "mlp.down.weight",
            "mlp.up.bias",
            "mlp.up.weight",
            "norm.weight",
        ] {
            names.push(format!("{layer}.{name}"));
        }
    }
    names.extend(["head.bias", "head.weight"].map(String::from));
    assert_eq!(vars.names(), names);

    let opt = ClippedOptimizer::wrap(
        SGD::new(model.map.all_vars(), RATE)?,
        &model.map,
        Clip::norm(LIMIT),
    )?;
    let mut opt = opt.with_param_norms(true);
    let grads = model.loss(0)?.backward()?;
    let report = opt.step_report(&grads)?;
    let norms = &report.record()?.param_norms;
    assert_eq!(norms.len(), names.len());
    for ((name, norm), var) in norms.iter().zip(vars.vars()) {
        let right = norm_by_hand(&grads, std::slice::from_ref(var))?;
        assert_close(*norm, right, EXACT, name);
    }
    let mut sorted = norms.clone();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
    let largest: Vec<(&str, f64)> = sorted[..3]
        .iter()
        .map(|(name, norm)| (name.as_str(), *norm))
        .collect();
    assert_eq!(report.record()?.largest_param_norms(3), largest);
    Ok(())
}

/// Each step against the equation, with the rates, decays and limits that the names say.
#[test]
fn groups_by_pattern() -> Result<()> {
    let run = || -> Result<(Vec<f64>, Vec<Vec<u64>>)> {
        let model = Model::new()?;
        let vars = NamedVars::from(&model.map);
        let params = ParamsSgd {
            lr: RATE,
            weight_decay: DECAY,
            ..ParamsSgd::default()
        };
        let opt = Sgd::from_named_vars(&model.map, params)?;
        let opt = ClippedOptimizer::wrap(opt, &model.map, Clip::norm(LIMIT).eps(0.0))?;
        let mut opt = opt.with_param_groups(groups()?)?;
        let mut losses = Vec::new();
        for step in 0..60 {
            let loss = model.loss(step)?;
            losses.push(f64::from(loss.to_scalar::<f32>()?));
            let grads = loss.backward()?;
            let before = values_of(vars.vars())?;
            let report = opt.step_report(&grads)?;
            let norm = norm_by_hand(&grads, vars.vars())?;
            assert_close(report.total_norm()?, norm, EXACT, "norm");
            let mut coefs = Vec::new();
            for (i, group) in report.record()?.groups.iter().enumerate() {
                let members = vars.names().iter().zip(vars.vars());
                let members = members.filter(|(name, _)| by_hand(name).2 == i);
                let members: Vec<Var> = members.map(|(_, var)| var.clone()).collect();
                let own = norm_by_hand(&grads, &members)?;
                assert_close(group.total_norm, own, EXACT, &group.name);
                coefs.push((LIMIT / norm).min(LIMITS[i] / own).min(1.0));
                assert_close(group.clip_coef, coefs[i], EXACT, &group.name);
            }
            for ((name, var), before) in vars.names().iter().zip(vars.vars()).zip(&before) {
                let (scale, decay, group) = by_hand(name);
                let grads = values(grads.get(var).unwrap())?;
                for ((after, before), grad) in values(var)?.iter().zip(before).zip(&grads) {
                    let right = before - RATE * scale * (coefs[group] * grad + decay * before);
                    let allowed = 4e-7 * (before.abs() + RATE * grad.abs());
                    assert!(
                        (after - right).abs() <= allowed,
                        "{name}: {after}, expected {right}"
                    );
                }
            }
        }
        Ok((losses, bits_of_vars(vars.vars())?))
    };
    let trained = run()?;
    let losses = &trained.0;
    assert!(mean(&losses[56..]) < 0.5 * mean(&losses[..4]), "{losses:?}");
    assert_eq!(run()?, trained);
    Ok(())
}

/// Around candle's SGD, which has one rate only.
#[test]
fn groups_of_candles_sgd() -> Result<()> {
    let groups = ParamGroups::new(vec![
        ParamGroup::new("lower", &["encoder.layers.0.*"]).lr_scale(0.25),
        ParamGroup::new("head", &["head.*"]).max_norm(0.05),
    ])?;
    let model = Model::new()?;
    let sgd = SGD::new(model.map.all_vars(), RATE)?;
    let error = ClippedOptimizer::wrap(sgd, &model.map, Clip::norm(LIMIT))?
        .with_param_groups(groups.clone())
        .unwrap_err();
    assert!(
        matches!(&error, Error::GroupsNeedFused { group, .. } if group == "lower"),
        "{error}"
    );

    let bits = |fused: bool| -> Result<Vec<Vec<f64>>> {
        let model = Model::new()?;
        let map = &model.map;
        let train = |step: &mut dyn FnMut(&Tensor) -> candle_core::Result<()>| -> Result<()> {
            (0..10).try_for_each(|i| Ok(step(&model.loss(i)?)?))
        };
        if fused {
            let opt =
                ClippedOptimizer::wrap(Sgd::from_named_vars(map, RATE)?, map, Clip::norm(LIMIT))?;
            let mut opt = opt.with_param_groups(groups.clone())?;
            train(&mut |loss| opt.backward_step(loss))?;
        } else {
            let opt = GroupedOptimizer::new(map, &groups, RATE, |vars, _, lr| SGD::new(vars, lr))?;
            let opt = ClippedOptimizer::wrap(opt, map, Clip::norm(LIMIT))?;
            let mut opt = opt.with_param_groups(groups.max_norms_only())?;
            train(&mut |loss| opt.backward_step(loss))?;
        }
        values_of(NamedVars::from(map).vars())
    };
    assert_eq!(bits(true)?, bits(false)?);
    Ok(())
}

/// A part of the model that is trained alone: patterns choose it, a typing error is found, and a
/// part that the loss does not reach is named.
#[test]
fn a_part_of_the_model() -> Result<()> {
    let model = Model::new()?;
    let all = || NamedVars::from(&model.map);
    let error = all()
        .matching(&["decoder.*", "haed.*"])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`haed.*`") && error.contains("`decoder.layers.0.mlp.down.bias`"),
        "{error}"
    );
    let part = all().matching(&["decoder.*", "head.*"])?;
    let rest = all().matching(&["encoder.*"])?;
    let before = bits_of_vars(rest.vars())?;
    let opt = SGD::new(part.vars().to_vec(), RATE)?;
    let mut opt = ClippedOptimizer::wrap(opt, part.clone(), Clip::norm(LIMIT))?;
    let grads = model.loss(0)?.backward()?;
    let report = opt.step_report(&grads)?;
    assert_close(
        report.total_norm()?,
        norm_by_hand(&grads, part.vars())?,
        EXACT,
        "norm",
    );
    assert_eq!(bits_of_vars(rest.vars())?, before);

    let sgd = SGD::new(model.map.all_vars(), RATE)?;
    let mut opt = ClippedOptimizer::wrap(sgd, &model.map, Clip::norm(LIMIT))?;
    let shortcut = model.head.forward(&data(0, (4, DIM))?)?.sqr()?.mean_all()?;
    let report = opt.backward_step_report(&shortcut)?;
    let unreached = all().matching(&["encoder.*", "decoder.*"])?;
    assert_eq!(report.missing_grads(), unreached.names());
    Ok(())
}
