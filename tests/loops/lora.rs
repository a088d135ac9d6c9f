//! `LoRA`: a frozen model whose Vars are in the same map, and a few trained Vars of low rank beside
//! each of its matrices.

use anyhow::Result;
use candle_core::{Tensor, Var};
use candle_grad_clip::optim::{AdamW, ParamGroup, ParamGroups, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, NamedVars};
use candle_nn::{Linear, Module, Optimizer, ParamsAdamW, SGD, VarBuilder, VarMap};
use support::checkpoints::Folder;
use support::gradients::{bits_of_vars, values};
use support::oracle::assert_close;

use super::{EXACT, builder, data, mean, norm_by_hand, start};

const DIM: usize = 12;
const RANK: usize = 2;
const LAYERS: usize = 4;

/// `base(x) + scale * B A x`
struct LoraLinear {
    base: Linear,
    a: Tensor,
    b: Tensor,
}

impl LoraLinear {
    fn new(vb: &VarBuilder) -> candle_core::Result<Self> {
        Ok(Self {
            base: candle_nn::linear(DIM, DIM, vb.clone())?,
            a: vb.get((RANK, DIM), "lora_a")?,
            b: vb.get((DIM, RANK), "lora_b")?,
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let low = (x.matmul(&self.a.t()?)?.matmul(&self.b.t()?)? * 2.0)?;
        self.base.forward(x)? + low
    }
}

struct Model {
    map: VarMap,
    layers: Vec<LoraLinear>,
}

impl Model {
    fn new() -> Result<Self> {
        let map = VarMap::new();
        let vb = builder(&map);
        let layer = |i| LoraLinear::new(&vb.pp(format!("layers.{i}.proj")));
        let layers = (0..LAYERS).map(layer).collect::<candle_core::Result<_>>()?;
        start(&map)?;
        let model = Self { map, layers };
        for b in model.vars("*.lora_b")?.vars() {
            b.set(&b.zeros_like()?)?; // the model starts as the frozen one
        }
        Ok(model)
    }

    fn vars(&self, pattern: &str) -> Result<NamedVars> {
        Ok(NamedVars::from(&self.map).matching(&[pattern])?)
    }

    fn frozen(&self) -> Result<NamedVars> {
        Ok(NamedVars::from(&self.map).matching(&["*.weight", "*.bias"])?)
    }

    /// The task: the batch in another order of its columns.
    fn loss(&self, step: u64) -> Result<Tensor> {
        let x = data(step % 4, (16, DIM))?;
        let mut y = x.clone();
        for layer in &self.layers {
            y = (&y + layer.forward(&y)?.tanh()?)?;
        }
        let goal = Tensor::cat(&[x.narrow(1, 1, DIM - 1)?, x.narrow(1, 0, 1)?], 1)?;
        Ok((y - goal)?.sqr()?.mean_all()?)
    }
}

fn adamw() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.02,
        ..ParamsAdamW::default()
    }
}

/// The losses and the trained weights.
fn train<O: Optimizer + 'static>(
    make: impl Fn(&NamedVars) -> Result<O>,
) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
    let model = Model::new()?;
    let (trained, frozen) = (model.vars("*.lora_*")?, model.frozen()?);
    assert_eq!(
        (trained.names().len(), frozen.names().len()),
        (2 * LAYERS, 2 * LAYERS)
    );
    let before = bits_of_vars(frozen.vars())?;
    let mut opt = ClippedOptimizer::wrap(make(&trained)?, trained.clone(), Clip::norm(0.5))?;
    let mut losses = Vec::new();
    for step in 0..80 {
        let loss = model.loss(step)?;
        losses.push(f64::from(loss.to_scalar::<f32>()?));
        let grads = loss.backward()?;
        assert!(
            norm_by_hand(&grads, frozen.vars())? > 0.0,
            "candle computes them all the same"
        );
        let report = opt.step_report(&grads)?;
        assert_close(
            report.total_norm()?,
            norm_by_hand(&grads, trained.vars())?,
            EXACT,
            "norm",
        );
        assert!(report.missing_grads().is_empty());
    }
    assert_eq!(bits_of_vars(frozen.vars())?, before, "frozen");
    Ok((losses, super::values_of(trained.vars())?))
}

#[test]
fn only_the_low_ranks_count_and_move() -> Result<()> {
    let theirs = |vars: &NamedVars| Ok(candle_nn::AdamW::new(vars.vars().to_vec(), adamw())?);
    let trained = train(theirs)?;
    let losses = &trained.0;
    assert!(mean(&losses[76..]) < 0.5 * mean(&losses[..4]), "{losses:?}");
    assert_eq!(train(theirs)?, trained);
    let ours = train(|vars| Ok(AdamW::from_named_vars(vars.clone(), adamw())?))?;
    assert_eq!(ours, trained, "the fused optimizer");
    Ok(())
}

/// In the first step B is 0, so the gradient of A is 0 too. That is not a missing gradient.
#[test]
fn the_first_gradient_of_a_is_zero_but_not_missing() -> Result<()> {
    let model = Model::new()?;
    let trained = model.vars("*.lora_*")?;
    let opt = SGD::new(trained.vars().to_vec(), 0.1)?;
    let opt = ClippedOptimizer::wrap(opt, trained, Clip::norm(0.5))?;
    let mut opt = opt.with_param_norms(true);
    for step in 0..2 {
        let report = opt.backward_step_report(&model.loss(step)?)?;
        assert!(report.missing_grads().is_empty());
        for (name, norm) in &report.record()?.param_norms {
            let is_zero = step == 0 && name.ends_with("lora_a");
            assert_eq!(*norm == 0.0, is_zero, "{step} {name} {norm}");
        }
    }
    Ok(())
}

/// The whole map around an optimizer of a part of it: what counts, and three ways to get it right.
#[test]
fn frozen_gradients_count_unless_the_wrapper_knows() -> Result<()> {
    let model = Model::new()?;
    let (trained, frozen) = (model.vars("*.lora_*")?, model.frozen()?);
    let grads = model.loss(0)?.backward()?;
    let of_trained = norm_by_hand(&grads, trained.vars())?;
    let of_all = norm_by_hand(&grads, NamedVars::from(&model.map).vars())?;
    assert!(of_all > 1.05 * of_trained, "{of_trained} {of_all}");
    let sgd = || SGD::new(trained.vars().to_vec(), 0.0);

    let mut opt = ClippedOptimizer::wrap(sgd()?, &model.map, Clip::norm(0.1))?;
    assert_close(
        opt.step_report(&grads)?.total_norm()?,
        of_all,
        EXACT,
        "candle can't tell",
    );

    let mut opt = ClippedOptimizer::wrap(sgd()?, trained.clone(), Clip::norm(0.1))?;
    assert_close(
        opt.step_report(&grads)?.total_norm()?,
        of_trained,
        EXACT,
        "`matching`",
    );

    let groups = ParamGroups::new(vec![
        ParamGroup::new("frozen", &["*.weight", "*.bias"]).no_clip(),
    ])?;
    let opt = ClippedOptimizer::wrap(sgd()?, &model.map, Clip::norm(0.1))?;
    let report = opt.with_param_groups(groups)?.step_report(&grads)?;
    assert_close(report.total_norm()?, of_trained, EXACT, "`no_clip`");
    let of_frozen = norm_by_hand(&grads, frozen.vars())?;
    assert_close(
        report.record()?.groups[0].total_norm,
        of_frozen,
        EXACT,
        "the frozen group",
    );

    let ours = Sgd::from_named_vars(trained.clone(), 0.0)?;
    let mut opt = ClippedOptimizer::wrap(ours, &model.map, Clip::norm(0.1))?;
    assert_close(
        opt.step_report(&grads)?.total_norm()?,
        of_trained,
        EXACT,
        "our Sgd",
    );
    assert_eq!(opt.vars().names(), trained.names());
    Ok(())
}

/// A run that is stopped and resumed: the optimizer's file has the trained Vars' state by name, and
/// fits no optimizer of other Vars.
#[test]
fn the_low_ranks_are_resumed() -> Result<()> {
    let folder = Folder::in_memory()?;
    let (state, weights) = (folder.join("state"), folder.join("weights"));
    let start = || -> Result<(Model, ClippedOptimizer<AdamW>)> {
        let model = Model::new()?;
        let trained = model.vars("*.lora_*")?;
        let opt = AdamW::from_named_vars(trained.clone(), adamw())?;
        Ok((
            model,
            ClippedOptimizer::wrap(opt, trained, Clip::norm(0.5))?,
        ))
    };
    let (model, mut opt) = start()?;
    (0..10).try_for_each(|step| Ok::<(), anyhow::Error>(opt.backward_step(&model.loss(step)?)?))?;
    opt.save(&state)?;
    model.map.save(&weights)?;
    (10..20)
        .try_for_each(|step| Ok::<(), anyhow::Error>(opt.backward_step(&model.loss(step)?)?))?;
    let right = bits_of_vars(NamedVars::from(&model.map).vars())?;

    let (mut model, mut opt) = start()?;
    model.map.load(&weights)?;
    opt.load(&state)?;
    (10..20)
        .try_for_each(|step| Ok::<(), anyhow::Error>(opt.backward_step(&model.loss(step)?)?))?;
    assert_eq!(bits_of_vars(NamedVars::from(&model.map).vars())?, right);

    let frozen = model.frozen()?;
    let other = AdamW::from_named_vars(frozen.clone(), adamw())?;
    let mut other = ClippedOptimizer::wrap(other, frozen, Clip::norm(0.5))?;
    let error = other.load(&state).unwrap_err().to_string();
    assert!(
        error.contains("lora_a") && error.contains("layers.0.proj.bias"),
        "{error}"
    );
    Ok(())
}

/// A frozen model can be plain tensors instead: then it has no Vars, and the map is the trained
/// part.
#[test]
fn a_frozen_model_of_tensors_needs_no_choice() -> Result<()> {
    let model = Model::new()?;
    let loss = model.loss(0)?;
    let grads = loss.backward()?;
    let map = VarMap::new();
    let vb = builder(&map);
    let layer = |(i, with_vars): (usize, &LoraLinear)| -> Result<LoraLinear> {
        let vb = vb.pp(format!("layers.{i}.proj"));
        let bias = with_vars.base.bias().map(Tensor::detach);
        let layer = LoraLinear {
            base: Linear::new(with_vars.base.weight().detach(), bias),
            a: vb.get((RANK, DIM), "lora_a")?,
            b: vb.get((DIM, RANK), "lora_b")?,
        };
        let name = |of: &str| format!("layers.{i}.proj.{of}");
        let data = map.data().lock().unwrap();
        data[&name("lora_a")].set(&with_vars.a)?;
        data[&name("lora_b")].set(&with_vars.b)?;
        drop(data);
        Ok(layer)
    };
    let layers = model
        .layers
        .iter()
        .enumerate()
        .map(layer)
        .collect::<Result<_>>()?;
    let plain = Model { map, layers };
    let sgd = SGD::new(plain.map.all_vars(), 0.1)?;
    let mut opt = ClippedOptimizer::wrap(sgd, &plain.map, Clip::norm(0.1))?;
    let report = opt.backward_step_report(&plain.loss(0)?)?;
    let trained: Vec<Var> = model.vars("*.lora_*")?.vars().to_vec();
    assert_close(
        report.total_norm()?,
        norm_by_hand(&grads, &trained)?,
        EXACT,
        "norm",
    );
    assert_eq!(values(&plain.loss(0)?)?.len(), 1);
    Ok(())
}
