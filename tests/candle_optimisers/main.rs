//! The optimizers of `candle-optimisers` in the wrapper: each step has the bits of clipping by hand.
//!
//! `step(&GradStore)` lends clipped gradients from a buffer that the next step overwrites. An
//! optimizer that kept a gradient tensor would differ from the second clipped step on. These copy
//! what they keep (`Var::from_tensor`). LBFGS does not implement `Optimizer`: it has no step from
//! gradients that could be clipped.
#![allow(clippy::unwrap_used)]

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::Optimizer;
use candle_optimisers::adadelta::{Adadelta, ParamsAdaDelta};
use candle_optimisers::adagrad::{Adagrad, ParamsAdaGrad};
use candle_optimisers::adam::{Adam, ParamsAdam};
use candle_optimisers::adamax::{Adamax, ParamsAdaMax};
use candle_optimisers::esgd::{ParamsSGD, SGD};
use candle_optimisers::nadam::{NAdam, ParamsNAdam};
use candle_optimisers::radam::{ParamsRAdam, RAdam};
use candle_optimisers::rmsprop::{ParamsRMSprop, RMSprop};
use candle_optimisers::{Decay, Momentum};
use support::gradients::{bits_of_vars, random_values, tensor, values};

const STEPS: u64 = 12;
/// Every second norm is above.
const MAX_NORM: f64 = 2.0;

fn model() -> Result<Vec<Var>> {
    let weights = [
        tensor(&random_values(12, 1), (4, 3), DType::F32)?,
        tensor(&random_values(3, 2), 3, DType::F32)?,
    ];
    Ok(weights
        .iter()
        .map(Var::from_tensor)
        .collect::<Result<_, _>>()?)
}

/// A linear model's squared error on the batch of this step, small and large in turn.
fn loss(vars: &[Var], step: u64) -> Result<Tensor> {
    let x = tensor(&random_values(32, 10 + step), (8, 4), DType::F32)?;
    let errors = (x.matmul(&vars[0])?.broadcast_add(&vars[1])? - 1.0)?;
    let size = if step.is_multiple_of(2) { 0.01 } else { 10.0 };
    Ok((errors.sqr()?.mean_all()? * size)?)
}

/// Clips as a user of candle would. Returns whether it changed anything.
fn clip_by_hand(grads: &mut GradStore, vars: &[Var]) -> Result<bool> {
    let mut squares = 0.0;
    for var in vars {
        let grad = values(grads.get(var).unwrap())?;
        squares += grad.iter().map(|x| x * x).sum::<f64>();
    }
    let coef = MAX_NORM / (squares.sqrt() + 1e-6);
    if coef < 1.0 {
        for var in vars {
            let clipped = (grads.get(var).unwrap() * coef)?;
            grads.insert(var, clipped);
        }
    }
    Ok(coef < 1.0)
}

fn has_the_bits_of_clipping_by_hand<O: Optimizer + 'static>(config: O::Config) -> Result<()>
where
    O::Config: Clone,
{
    let (by_hand, lent, owned) = (model()?, model()?, model()?);
    let wrap = |vars: &[Var]| {
        let opt = O::new(vars.to_vec(), config.clone())?;
        ClippedOptimizer::wrap(opt, vars.to_vec(), Clip::norm(MAX_NORM))
    };
    let mut opt_by_hand = O::new(by_hand.clone(), config.clone())?;
    let (mut opt_lent, mut opt_owned) = (wrap(&lent)?, wrap(&owned)?);
    let mut clipped = 0;
    for step in 0..STEPS {
        let mut grads = loss(&by_hand, step)?.backward()?;
        clipped += u64::from(clip_by_hand(&mut grads, &by_hand)?);
        opt_by_hand.step(&grads)?;
        opt_lent.step(&loss(&lent, step)?.backward()?)?;
        opt_owned.backward_step(&loss(&owned, step)?)?;
        let expected = bits_of_vars(&by_hand)?;
        let what = format!("{}, step {step}", std::any::type_name::<O>());
        assert_eq!(bits_of_vars(&lent)?, expected, "{what}: step");
        assert_eq!(bits_of_vars(&owned)?, expected, "{what}: backward_step");
    }
    assert!(clipped > 1 && clipped < STEPS, "{clipped} of {STEPS}");
    Ok(())
}

#[test]
fn sgd() -> Result<()> {
    let momenta = [
        None,
        Some(Momentum::Classical(0.9)),
        Some(Momentum::Nesterov(0.9)),
    ];
    let decays = [
        None,
        Some(Decay::WeightDecay(0.1)),
        Some(Decay::DecoupledWeightDecay(0.1)),
    ];
    for momentum in momenta {
        for weight_decay in decays {
            has_the_bits_of_clipping_by_hand::<SGD>(ParamsSGD {
                momentum,
                weight_decay,
                ..ParamsSGD::default()
            })?;
        }
    }
    Ok(())
}

#[test]
fn adam() -> Result<()> {
    for (amsgrad, weight_decay) in [
        (false, None),
        (true, None),
        (false, Some(Decay::WeightDecay(0.1))),
        (true, Some(Decay::DecoupledWeightDecay(0.1))),
    ] {
        has_the_bits_of_clipping_by_hand::<Adam>(ParamsAdam {
            amsgrad,
            weight_decay,
            ..ParamsAdam::default()
        })?;
    }
    Ok(())
}

#[test]
fn rmsprop() -> Result<()> {
    for momentum in [None, Some(0.9)] {
        for centered in [false, true] {
            has_the_bits_of_clipping_by_hand::<RMSprop>(ParamsRMSprop {
                momentum,
                centered,
                ..ParamsRMSprop::default()
            })?;
        }
    }
    Ok(())
}

#[test]
fn adagrad_adadelta_adamax_nadam_and_radam() -> Result<()> {
    has_the_bits_of_clipping_by_hand::<Adagrad>(ParamsAdaGrad::default())?;
    has_the_bits_of_clipping_by_hand::<Adadelta>(ParamsAdaDelta::default())?;
    has_the_bits_of_clipping_by_hand::<Adamax>(ParamsAdaMax::default())?;
    has_the_bits_of_clipping_by_hand::<NAdam>(ParamsNAdam::default())?;
    has_the_bits_of_clipping_by_hand::<RAdam>(ParamsRAdam::default())
}
