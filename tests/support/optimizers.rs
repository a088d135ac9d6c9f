//! Optimizers that a user of candle might write.

use candle_core::backprop::GradStore;
use candle_core::{Error, Result, Tensor, Var};
use candle_nn::{Optimizer, SGD};

/// SGD with momentum: `v <- momentum * v + g`, `w <- w - lr * v`.
#[derive(Debug)]
pub struct MomentumSgd {
    vars: Vec<(Var, Var)>,
    params: ParamsMomentumSgd,
}

/// Config of [`MomentumSgd`].
#[derive(Debug, Clone)]
pub struct ParamsMomentumSgd {
    /// Learning rate.
    pub lr: f64,
    /// What is kept of the velocity.
    pub momentum: f64,
}

impl Optimizer for MomentumSgd {
    type Config = ParamsMomentumSgd;

    fn new(vars: Vec<Var>, params: Self::Config) -> Result<Self> {
        let with_velocity = |var: Var| {
            let velocity = Var::zeros(var.shape(), var.dtype(), var.device())?;
            Ok((var, velocity))
        };
        Ok(Self {
            vars: vars.into_iter().map(with_velocity).collect::<Result<_>>()?,
            params,
        })
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        for (var, velocity) in &self.vars {
            if let Some(grad) = grads.get(var) {
                velocity.set(&((velocity.as_tensor() * self.params.momentum)? + grad)?)?;
                var.set(&(var.as_tensor() - (velocity.as_tensor() * self.params.lr)?)?)?;
            }
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.params.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = lr;
    }
}

/// Changes nothing, and keeps copies of the gradients that it was given.
#[derive(Debug)]
pub struct Recorder {
    vars: Vec<Var>,
    /// Whether to keep copies (they allocate).
    pub keep: bool,
    /// The gradients of each Var in each step.
    pub steps: Vec<Vec<Option<Tensor>>>,
}

impl Optimizer for Recorder {
    type Config = bool;

    fn new(vars: Vec<Var>, keep: bool) -> Result<Self> {
        Ok(Self {
            vars,
            keep,
            steps: Vec::new(),
        })
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        if self.keep {
            let copy = |var: &Var| grads.get(var).map(Tensor::copy).transpose();
            self.steps
                .push(self.vars.iter().map(copy).collect::<Result<_>>()?);
        }
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        0.0
    }

    fn set_learning_rate(&mut self, _: f64) {}
}

/// candle's SGD, but for the steps that fail.
#[derive(Debug)]
pub struct Failing {
    sgd: SGD,
    /// Whether the next step fails, and says that the disk is full.
    pub fails: bool,
}

impl Optimizer for Failing {
    type Config = f64;

    fn new(vars: Vec<Var>, lr: f64) -> Result<Self> {
        let sgd = SGD::new(vars, lr)?;
        Ok(Self { sgd, fails: false })
    }

    fn step(&mut self, grads: &GradStore) -> Result<()> {
        if self.fails {
            return Err(Error::Msg("the disk is full".into()));
        }
        self.sgd.step(grads)
    }

    fn learning_rate(&self) -> f64 {
        self.sgd.learning_rate()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.sgd.set_learning_rate(lr);
    }
}
