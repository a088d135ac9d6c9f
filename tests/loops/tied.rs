//! Tied embeddings: the table of the tokens is the matrix of the output layer, one Var used twice.

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use candle_grad_clip::optim::{AdamW, ParamGroup, ParamGroups, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NamedVars};
use candle_nn::{Embedding, Linear, Module, Optimizer, ParamsAdamW, SGD, VarMap, loss};
use support::gradients::{bits_of_vars, values};
use support::oracle::{self, assert_close};

use super::{EXACT, assert_moved, builder, mean, norm_by_hand, start, values_of};

const VOCAB: usize = 10;
const DIM: usize = 6;

struct Model {
    map: VarMap,
    embed: Embedding,
    body: Linear,
    head: Linear,
}

impl Model {
    /// The second layer asks for the same name, or is made of the first one's tensor: either way
    /// the map has one Var.
    fn new(by_name: bool) -> Result<Self> {
        let map = VarMap::new();
        let vb = builder(&map);
        let embed = candle_nn::embedding(VOCAB, DIM, vb.pp("wte"))?;
        let body = candle_nn::linear(DIM, DIM, vb.pp("body"))?;
        let head = if by_name {
            candle_nn::linear_no_bias(DIM, VOCAB, vb.pp("wte"))?
        } else {
            Linear::new(embed.embeddings().clone(), None)
        };
        start(&map)?;
        Ok(Self {
            map,
            embed,
            body,
            head,
        })
    }

    /// The same weights, but the head has its own matrix.
    fn untied(&self) -> Result<(Self, Var, Var)> {
        let copy = |tensor: &Tensor| Var::from_tensor(&tensor.detach().copy()?);
        let (table, matrix) = (copy(self.embed.embeddings())?, copy(self.head.weight())?);
        let model = Self {
            map: self.map.clone(),
            embed: Embedding::new(table.as_tensor().clone(), DIM),
            body: self.body.clone(),
            head: Linear::new(matrix.as_tensor().clone(), None),
        };
        Ok((model, table, matrix))
    }

    /// Which token comes after each: the third next.
    fn loss(&self) -> Result<Tensor> {
        let vocab = VOCAB as u32;
        let tokens = Tensor::arange(0, vocab, &Device::Cpu)?;
        let next: Vec<u32> = (0..vocab).map(|token| (token + 3) % vocab).collect();
        let hidden = self.body.forward(&self.embed.forward(&tokens)?)?.tanh()?;
        let logits = (self.head.forward(&hidden)? * 3.0)?;
        Ok(loss::cross_entropy(
            &logits,
            &Tensor::new(next, &Device::Cpu)?,
        )?)
    }
}

/// The gradient of a tied Var is the sum of both uses' gradients, and counts once: not as two.
#[test]
fn the_gradient_is_the_sum_of_both_uses_and_counts_once() -> Result<()> {
    for by_name in [false, true] {
        let model = Model::new(by_name)?;
        let vars = NamedVars::from(&model.map);
        assert_eq!(vars.names(), ["body.bias", "body.weight", "wte.weight"]);
        let (untied, table, matrix) = model.untied()?;
        let apart = untied.loss()?.backward()?;
        let of = |var: &Var| values(apart.get(var).unwrap());
        let summed: Vec<f64> = of(&table)?
            .iter()
            .zip(of(&matrix)?)
            .map(|(a, b)| a + b)
            .collect();
        let body = norm_by_hand(&apart, &vars.vars()[..2])?;
        let right = body.hypot(oracle::norm(&summed, 2.0));
        let as_two = body.hypot(norm_by_hand(&apart, &[table, matrix])?);
        assert!((right - as_two).abs() > 0.01 * right, "{right} {as_two}");

        let sgd = SGD::new(model.map.all_vars(), 0.1)?;
        let mut opt = ClippedOptimizer::wrap(sgd, &model.map, Clip::norm(0.1))?;
        let grads = model.loss()?.backward()?;
        let before = values_of(vars.vars())?;
        let report = opt.step_report(&grads)?;
        assert_close(
            report.total_norm()?,
            norm_by_hand(&grads, vars.vars())?,
            EXACT,
            "norm",
        );
        assert_close(report.total_norm()?, right, 1e-6, "of the sum"); // summed in f32
        assert!(report.missing_grads().is_empty());
        assert_moved(vars.vars(), &before, &grads, 0.1 * report.clip_coef()?)?;
    }
    Ok(())
}

/// A list with both names: the Var is kept once, under the first. A pattern for the second is an
/// error, not a group that is silently empty.
#[test]
fn a_list_with_both_names_keeps_the_first() -> Result<()> {
    let model = Model::new(false)?;
    let data = model.map.data().lock().unwrap();
    let list: Vec<(String, Var)> = [
        ("wte.weight", "wte.weight"),
        ("body.weight", "body.weight"),
        ("body.bias", "body.bias"),
        ("lm_head.weight", "wte.weight"),
    ]
    .map(|(name, of)| (name.to_string(), data[of].clone()))
    .to_vec();
    drop(data);
    let vars = NamedVars::from(list);
    assert_eq!(vars.names(), ["wte.weight", "body.weight", "body.bias"]);
    let grads = model.loss()?.backward()?;
    let opt = || Sgd::from_named_vars(vars.clone(), 0.1);
    let mut wrapped = ClippedOptimizer::wrap(opt()?, vars.clone(), Clip::norm(0.1))?;
    let before = values_of(vars.vars())?;
    let report = wrapped.step_report(&grads)?;
    assert_close(
        report.total_norm()?,
        norm_by_hand(&grads, vars.vars())?,
        EXACT,
        "norm",
    );
    assert_moved(vars.vars(), &before, &grads, 0.1 * report.clip_coef()?)?; // and once, not twice
    let groups = ParamGroups::new(vec![ParamGroup::new("head", &["lm_head.*"]).lr_scale(0.1)])?;
    let error = ClippedOptimizer::wrap(opt()?, vars.clone(), Clip::norm(0.1))?
        .with_param_groups(groups)
        .unwrap_err();
    assert!(
        matches!(&error, Error::UnmatchedPattern { pattern, vars: 3, .. } if pattern == "lm_head.*"),
        "{error}"
    );
    Ok(())
}

/// candle's optimizers update a Var as often as it is in their list; ours once.
#[test]
fn an_optimizer_that_lists_the_var_twice() -> Result<()> {
    let lists = |map: &VarMap| {
        let vars = NamedVars::from(map).vars().to_vec();
        [vars.clone(), vec![vars[2].clone()]].concat()
    };
    let model = Model::new(false)?;
    let vars = NamedVars::from(&model.map);
    let grads = model.loss()?.backward()?;
    let before = values_of(vars.vars())?;
    let mut opt = ClippedOptimizer::wrap(
        SGD::new(lists(&model.map), 0.1)?,
        &model.map,
        Clip::norm(0.1),
    )?;
    let rate = 0.1 * opt.step_report(&grads)?.clip_coef()?;
    assert_moved(&vars.vars()[..2], &before, &grads, rate)?;
    assert_moved(&vars.vars()[2..], &before[2..], &grads, 2.0 * rate)?; // twice: candle's

    let model = Model::new(false)?;
    let vars = NamedVars::from(&model.map);
    let grads = model.loss()?.backward()?;
    let before = values_of(vars.vars())?;
    let sgd = Sgd::new_lr(lists(&model.map), 0.1)?;
    let mut opt = ClippedOptimizer::wrap(sgd, &model.map, Clip::norm(0.1))?;
    let rate = 0.1 * opt.step_report(&grads)?.clip_coef()?;
    assert_moved(vars.vars(), &before, &grads, rate)?;
    Ok(())
}

fn train<O: Optimizer + 'static>(
    by_name: bool,
    make: impl Fn(NamedVars) -> Result<O>,
) -> Result<(Vec<f64>, Vec<Vec<u64>>)> {
    let model = Model::new(by_name)?;
    let opt = make(NamedVars::from(&model.map))?;
    let mut opt = ClippedOptimizer::wrap(opt, &model.map, Clip::norm(0.5))?;
    let mut losses = Vec::new();
    for _ in 0..100 {
        let loss = model.loss()?;
        losses.push(f64::from(loss.to_scalar::<f32>()?));
        opt.backward_step(&loss)?;
    }
    Ok((losses, bits_of_vars(opt.vars().vars())?))
}

#[test]
fn tied_models_train() -> Result<()> {
    let params = || ParamsAdamW {
        lr: 0.03,
        ..ParamsAdamW::default()
    };
    let theirs = |vars: NamedVars| Ok(candle_nn::AdamW::new(vars.vars().to_vec(), params())?);
    let trained = train(false, theirs)?;
    let losses = &trained.0;
    assert!(mean(&losses[95..]) < 0.3 * losses[0], "{losses:?}");
    assert_eq!(train(true, theirs)?, trained, "tied by name");
    let ours = train(false, |vars| Ok(AdamW::from_named_vars(vars, params())?))?;
    assert_eq!(&ours.0, losses, "the fused optimizer");
    Ok(())
}
