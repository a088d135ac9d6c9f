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

use crate::cases::{Number, dtype, in_dtype};
use crate::gradients::{loss_with_gradients, tensor, values};

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimFile {
    /// The framework's name.
    pub framework: String,
    /// Its version.
    pub version: String,
    /// What its norm clip adds to the norm.
    pub eps: f64,
    /// The cases.
    pub cases: Vec<OptimCase>,
}

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
pub fn all() -> serde_json::Result<OptimFile> {
    serde_json::from_str(include_str!("../cases/optim_pytorch.json"))
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

/// A number beside the one that was expected.
#[derive(Debug)]
pub struct Difference {
    /// Which number.
    pub what: String,
    /// The parameter's dtype; none of a norm.
    pub dtype: Option<DType>,
    /// Where no error is allowed, 0 or infinite; else the difference as a share of what is allowed.
    pub of_allowed: f64,
}

impl Difference {
    /// Whether it is too large. NaN is.
    #[must_use]
    pub fn is_fault(&self) -> bool {
        self.of_allowed.is_nan() || self.of_allowed > 1.0
    }
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
        let named = || -> Vec<(String, Var)> {
            let name = |(i, var): (usize, &Var)| (format!("layer.{i}"), var.clone());
            vars.iter().enumerate().map(name).collect()
        };
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
                    Way::Step | Way::BackwardStep => AdamW::named(named(), params)?,
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
                    Way::Step | Way::BackwardStep => Sgd::named(named(), params)?,
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
        let mut store = GradStore::default();
        for (var, grad) in vars.iter().zip(grads) {
            store.insert(var, grad);
        }
        Ok(store)
    }

    fn lr(&self, step: usize) -> f64 {
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

    /// How far each number is from the expected one.
    ///
    /// # Panics
    /// If there are more or fewer than expected.
    #[must_use]
    pub fn differences(&self, outcome: &Outcome) -> Vec<Difference> {
        let mut differences = Vec::new();
        let norms = self.total_norms.as_deref().unwrap_or_default();
        let id = &self.id;
        assert_eq!(outcome.total_norms.len(), norms.len(), "{id}: norms");
        assert_eq!(outcome.ends.len(), self.tensors.len(), "{id}: parameters");
        let relative = self.tensors.iter().map(|one| Row::of(one.dtype).norm);
        let relative = relative.fold(0.0, f64::max);
        for (step, (ours, theirs)) in outcome.total_norms.iter().zip(norms).enumerate() {
            differences.push(Difference {
                what: format!("norm of step {step}: {ours:e}, expected {:e}", theirs.0),
                dtype: None,
                of_allowed: share(*ours, theirs.0, relative * theirs.0),
            });
        }
        for (index, (ours, one)) in outcome.ends.iter().zip(&self.tensors).enumerate() {
            let theirs = in_dtype(&one.end, one.dtype);
            assert_eq!(ours.len(), theirs.len(), "{id}: elements of {index}");
            for (at, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                let allowed = self.allowed(index, at);
                differences.push(Difference {
                    what: format!("element {at} of {index}: {ours:e}, expected {theirs:e}"),
                    dtype: Some(one.dtype),
                    of_allowed: share(*ours, theirs, allowed),
                });
            }
        }
        differences
    }

    /// How far an element may be from where it should end.
    #[must_use]
    pub fn allowed(&self, index: usize, at: usize) -> f64 {
        let one = &self.tensors[index];
        let reach = one.reach.as_ref().map_or(0.0, |reach| reach[at].0);
        let lrs = (0..self.steps()).map(|step| self.lr(step));
        let on_the_way = [one.start[at].0.abs(), one.end[at].0.abs(), reach];
        let scale = on_the_way.into_iter().chain(lrs).fold(0.0, f64::max);
        Row::of(one.dtype).relative(self.steps()) * scale
    }
}

fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// A difference as a share of the one that is allowed; 0 for the same number or NaN.
fn share(ours: f64, theirs: f64, allowed: f64) -> f64 {
    if ours == theirs || (ours.is_nan() && theirs.is_nan()) {
        0.0
    } else if ours.is_finite() && theirs.is_finite() {
        (ours - theirs).abs() / allowed
    } else {
        f64::INFINITY
    }
}

/// A row of `TOLERANCES`. All but `norm` are relative to the largest of the magnitudes that the
/// element had on its way and of the learning rates, as an update's error is relative to these.
#[derive(Debug, Clone, Copy)]
struct Row {
    dtype: DType,
    /// After any number of steps.
    a_run: f64,
    /// More for each step.
    a_step: f64,
    /// Relative, of a norm: PyTorch's is an f32 sum, of halves as well, and so is that of candle's
    /// operations.
    norm: f64,
}

/// The one table of tolerances.
///
/// - f64: 20 steps of a few roundings of 1.1e-16 leave a wide margin.
/// - f32: 2 units in the last place a step (a unit is at most 2^-23 of the number): PyTorch and we
///   order the operations differently, and PyTorch's CPU code fuses some multiplications and
///   additions. PyTorch is up to 0.46 of this from the f64 formulas, and we up to 0.40 from it. A
///   norm of a few elements that is measured in f32 adds a rounding or two.
/// - bf16 and f16: the same bits. One rounding of an f32 result to the half hides errors in f32;
///   the generator leaves out runs with a number so near the middle of two halves that twice f32's
///   tolerance could tip it.
#[rustfmt::skip]
const TOLERANCES: [Row; 4] = [
    Row { dtype: DType::F64,  a_run: 1e-12, a_step: 0.0,               norm: 1e-12 },
    Row { dtype: DType::F32,  a_run: 0.0,   a_step: 1.0 / 4_194_304.0, norm: 1e-6 },
    Row { dtype: DType::F16,  a_run: 0.0,   a_step: 0.0,               norm: 1e-6 },
    Row { dtype: DType::BF16, a_run: 0.0,   a_step: 0.0,               norm: 1e-6 },
];

impl Row {
    fn of(dtype: DType) -> Self {
        let row = TOLERANCES.into_iter().find(|row| row.dtype == dtype);
        row.expect("one of the four dtypes")
    }

    fn relative(self, steps: usize) -> f64 {
        self.a_run + self.a_step * steps as f64
    }
}
