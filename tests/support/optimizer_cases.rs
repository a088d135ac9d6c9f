//! The optimizer cases: where PyTorch's AdamW and SGD end, as data. See `tests/cases/README.md`.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Var};
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{
    Clip, ClipGradNorm, ClippedOptimizer, NonFinite, clip_grad_norm_with, clip_grad_value,
};
use candle_nn::{Optimizer, ParamsAdamW};
use serde::Deserialize;

use crate::cases::{CaseFile, Number, dtype, in_dtype};
use crate::gradients::{loss_with_gradients, named_by_place, store_for, tensor, values};

/// An optimizer, parameters, the gradients of each step, and where the parameters end.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimCase {
    /// Says what is in it.
    pub id: String,
    /// Which optimizer.
    pub optimizer: Hyper,
    /// The learning rate of each step, if they differ.
    #[serde(default)]
    pub lrs: Option<Vec<f64>>,
    /// Whether halves are trained as f32 copies.
    #[serde(default)]
    pub master_weights: bool,
    /// What is done to the gradients before each step.
    #[serde(default)]
    pub clip: Option<Limit>,
    /// The norm before each step, where that is clipped.
    #[serde(default)]
    pub total_norms: Option<Vec<Number>>,
    /// One for each parameter.
    pub tensors: Vec<OptimTensor>,
}

/// An optimizer with its hyper-parameters.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Hyper {
    AdamW(AdamWHyper),
    Sgd(SgdHyper),
}

/// Those of `torch.optim.AdamW`.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct AdamWHyper {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub amsgrad: bool,
}

/// Those of `torch.optim.SGD`.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct SgdHyper {
    pub lr: f64,
    pub momentum: f64,
    pub dampening: f64,
    pub weight_decay: f64,
    pub nesterov: bool,
}

/// A clip with its limit.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Limit {
    Norm(f64),
    Value(f64),
}

/// One parameter.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimTensor {
    #[serde(deserialize_with = "dtype")]
    /// The dtype.
    pub dtype: DType,
    /// The shape.
    pub shape: Vec<usize>,
    /// The parameter before the first step.
    pub start: Vec<Number>,
    /// The gradient in each step; none if the parameter got none.
    pub grads: Vec<Option<Vec<Number>>>,
    /// The parameter after the last step.
    pub end: Vec<Number>,
    /// The largest magnitude of each element on the way, if that is neither its first nor its last.
    #[serde(default)]
    pub reach: Option<Vec<Number>>,
}

/// The cases.
///
/// # Errors
/// A file that is not as described here.
pub fn all() -> serde_json::Result<CaseFile<OptimCase>> {
    CaseFile::parse(include_str!("../cases/optim_pytorch.json"))
}

/// How the optimizer is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Without a wrapper; what is to be clipped is clipped by our functions, before.
    Alone,
    /// `ClippedOptimizer::step_report`.
    Step,
    /// `ClippedOptimizer::backward_step_report`.
    BackwardStep,
}

/// All of them.
pub const WAYS: [Way; 3] = [Way::Alone, Way::Step, Way::BackwardStep];

/// What came out.
#[derive(Debug)]
pub struct Outcome {
    /// The norm of each step that was clipped by norm.
    pub total_norms: Vec<f64>,
    /// The parameters after the last step.
    pub ends: Vec<Vec<f64>>,
}

impl OptimCase {
    /// How many steps are taken.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.tensors.first().map_or(0, |one| one.grads.len())
    }

    /// Whether a parameter is bf16 or f16.
    #[must_use]
    pub fn has_halves(&self) -> bool {
        self.tensors.iter().any(|one| is_half(one.dtype))
    }

    /// Whether the case can be run so: our functions round clipped gradients of halves to halves,
    /// where the reference's are f32 copies, and so is what a fused step computes.
    #[must_use]
    pub fn can_run(&self, way: Way) -> bool {
        way != Way::Alone || self.clip.is_none() || !self.has_halves()
    }

    /// Takes all steps.
    ///
    /// # Errors
    /// Those of the library.
    pub fn run(&self, way: Way) -> Result<Outcome> {
        let vars = self.vars()?;
        match self.optimizer {
            Hyper::AdamW(hyper) => {
                let params = ParamsAdamW {
                    lr: hyper.lr,
                    beta1: hyper.beta1,
                    beta2: hyper.beta2,
                    eps: hyper.eps,
                    weight_decay: hyper.weight_decay,
                };
                let opt = match way {
                    Way::Alone => AdamW::new(vars.clone(), params)?,
                    Way::Step | Way::BackwardStep => {
                        AdamW::from_named_vars(named_by_place(&vars), params)?
                    }
                };
                let opt = opt.amsgrad(hyper.amsgrad);
                self.train(opt.master_weights(self.master_weights), &vars, way)
            }
            Hyper::Sgd(hyper) => {
                let params = ParamsSgd {
                    lr: hyper.lr,
                    momentum: hyper.momentum,
                    dampening: hyper.dampening,
                    weight_decay: hyper.weight_decay,
                    nesterov: hyper.nesterov,
                };
                let opt = match way {
                    Way::Alone => Sgd::new(vars.clone(), params)?,
                    Way::Step | Way::BackwardStep => {
                        Sgd::from_named_vars(named_by_place(&vars), params)?
                    }
                };
                self.train(opt.master_weights(self.master_weights), &vars, way)
            }
        }
    }

    fn train<O: Optimizer + 'static>(&self, mut opt: O, vars: &[Var], way: Way) -> Result<Outcome> {
        let mut total_norms = Vec::new();
        if way == Way::Alone {
            for step in 0..self.steps() {
                let mut grads = self.store(vars, step)?;
                total_norms.extend(self.clip_by_function(vars, &mut grads)?);
                opt.set_learning_rate(self.lr(step));
                opt.step(&grads)?;
            }
        } else {
            let mut opt = ClippedOptimizer::wrap(opt, vars.to_vec(), self.clip())?;
            for step in 0..self.steps() {
                opt.set_learning_rate(self.lr(step));
                let report = if way == Way::Step {
                    opt.step_report(&self.store(vars, step)?)?
                } else {
                    let (vars, grads) = self.given(vars, step)?;
                    opt.backward_step_report(&loss_with_gradients(&vars, &grads)?)?
                };
                if let Some(Limit::Norm(_)) = self.clip {
                    total_norms.push(report.total_norm()?);
                }
            }
        }
        let ends = vars.iter().map(|var| values(var));
        Ok(Outcome {
            total_norms,
            ends: ends.collect::<candle_core::Result<_>>()?,
        })
    }

    fn vars(&self) -> Result<Vec<Var>> {
        let var = |one: &OptimTensor| -> Result<Var> {
            let start = in_dtype(&one.start, one.dtype);
            Ok(Var::from_tensor(&tensor(
                &start,
                one.shape.as_slice(),
                one.dtype,
            )?)?)
        };
        self.tensors.iter().map(var).collect()
    }

    /// The Vars that have a gradient in that step, with it.
    fn given(&self, vars: &[Var], step: usize) -> Result<(Vec<Var>, Vec<candle_core::Tensor>)> {
        let (mut with, mut grads) = (Vec::new(), Vec::new());
        for (var, one) in vars.iter().zip(&self.tensors) {
            if let Some(grad) = &one.grads[step] {
                let grad = in_dtype(grad, one.dtype);
                grads.push(tensor(&grad, one.shape.as_slice(), one.dtype)?);
                with.push(var.clone());
            }
        }
        Ok((with, grads))
    }

    fn store(&self, vars: &[Var], step: usize) -> Result<GradStore> {
        let (vars, grads) = self.given(vars, step)?;
        Ok(store_for(&vars, &grads))
    }

    pub(crate) fn lr(&self, step: usize) -> f64 {
        match (&self.lrs, self.optimizer) {
            (Some(lrs), _) => lrs[step],
            (None, Hyper::AdamW(hyper)) => hyper.lr,
            (None, Hyper::Sgd(hyper)) => hyper.lr,
        }
    }

    fn clip(&self) -> Clip {
        let clip = match self.clip {
            None => Clip::none(),
            Some(Limit::Norm(max_norm)) => Clip::norm(max_norm),
            Some(Limit::Value(clip_value)) => Clip::value(clip_value),
        };
        clip.non_finite(NonFinite::Propagate)
    }

    fn clip_by_function(&self, vars: &[Var], grads: &mut GradStore) -> Result<Option<f64>> {
        Ok(match self.clip {
            None => None,
            Some(Limit::Norm(max_norm)) => {
                let options = ClipGradNorm {
                    max_norm,
                    non_finite: NonFinite::Propagate,
                    ..ClipGradNorm::default()
                };
                Some(clip_grad_norm_with(grads, vars, &options)?)
            }
            Some(Limit::Value(clip_value)) => {
                clip_grad_value(grads, vars, clip_value)?;
                None
            }
        })
    }
}

fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}
