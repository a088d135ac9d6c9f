//! The table of the contract suite: every promise holds for every (optimizer, dtype, backend).
#![allow(clippy::missing_errors_doc)] // those of candle and of the optimizer

use std::fmt;

use candle_core::{DType, Result, Tensor, Var};
use candle_grad_clip::backend::{self, Backend};
use candle_grad_clip::{Clip, ClippedConfig, ClippedOptimizer, NonFinite};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};

use crate::gradients::{tensors_of, vars_of};
use crate::optimizers::ParamsMomentumSgd;

/// The dtypes of the Vars, in turn.
pub const DTYPES: [&[DType]; 5] = [
    &[DType::F32],
    &[DType::F64],
    &[DType::F16],
    &[DType::BF16],
    &[DType::F32, DType::BF16, DType::F64, DType::F16],
];

/// Shapes of the Vars: a matrix, a vector, a scalar, a tensor of rank 3.
const SHAPES: [&[usize]; 4] = [&[5, 4], &[3], &[], &[2, 3, 2]];

/// A row: an optimizer with its config, dtypes and a backend.
#[derive(Debug)]
pub struct Row<O: Optimizer> {
    /// The optimizer's name.
    pub optimizer: &'static str,
    /// Makes the config.
    pub config: fn() -> O::Config,
    /// The dtypes of the Vars, in turn.
    pub dtypes: &'static [DType],
    /// What measures and edits.
    pub backend: Backend,
    /// Whether the optimizer takes the clip into its update.
    pub fused: bool,
}

impl<O: Optimizer> fmt::Display for Row<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} {:?}", self.optimizer, self.dtypes, self.backend)
    }
}

impl<O: Optimizer + 'static> Row<O> {
    /// Vars with the same values each time.
    pub fn vars(&self) -> Result<Vec<Var>> {
        vars_of(&self.tensors(1000)?)
    }

    /// Gradients of a step: of another norm each step, so that also an optimizer that rescales its
    /// gradients shows whether they were clipped.
    pub fn gradients(&self, step: u64) -> Result<Vec<Tensor>> {
        let gain = [1.0, 8.0, 0.5, 4.0][step as usize % 4];
        self.tensors(step)?.iter().map(|t| t * gain).collect()
    }

    fn tensors(&self, seed: u64) -> Result<Vec<Tensor>> {
        tensors_of(&SHAPES, seed * 10, self.dtypes)
    }

    /// The bare optimizer.
    pub fn bare(&self, vars: &[Var]) -> Result<O> {
        O::new(vars.to_vec(), (self.config)())
    }

    /// The optimizer with clipping.
    pub fn clipped(&self, vars: &[Var], clip: Clip) -> Result<ClippedOptimizer<O>> {
        Ok(ClippedOptimizer::wrap(
            self.bare(vars)?,
            vars.to_vec(),
            clip,
        )?)
    }

    /// Runs `f` with the row's backend.
    pub fn run<R>(&self, f: impl FnOnce() -> R) -> R {
        backend::with_backend(self.backend, f)
    }

    /// The coarsest dtype's tolerance, at least f32's for candle's operations.
    #[must_use]
    pub fn tolerance(&self) -> f64 {
        let of_dtypes = self
            .dtypes
            .iter()
            .map(|dtype| crate::oracle::tolerance(*dtype));
        let floor = match self.backend {
            Backend::CandleOps => 1e-5,
            _ => 1e-12,
        };
        of_dtypes.fold(floor, f64::max)
    }
}

/// Configs of the optimizers in the table.
pub mod config {
    use candle_grad_clip::optim::ParamsSgd;

    use super::{Clip, ClippedConfig, NonFinite, ParamsAdamW, ParamsMomentumSgd};

    /// candle's SGD.
    #[must_use]
    pub fn sgd() -> f64 {
        0.0625
    }

    /// candle's AdamW.
    #[must_use]
    pub fn adamw() -> ParamsAdamW {
        ParamsAdamW {
            lr: 0.25,
            ..ParamsAdamW::default()
        }
    }

    /// A user's optimizer.
    #[must_use]
    pub fn momentum_sgd() -> ParamsMomentumSgd {
        ParamsMomentumSgd {
            lr: 0.0625,
            momentum: 0.75,
        }
    }

    /// Our SGD, with Nesterov momentum and weight decay.
    #[must_use]
    pub fn fused_sgd() -> ParamsSgd {
        ParamsSgd {
            lr: 0.0625,
            momentum: 0.75,
            weight_decay: 0.125,
            nesterov: true,
            ..ParamsSgd::default()
        }
    }

    /// A clipped optimizer, to be wrapped again: it clips by value what the outer one clips by
    /// norm.
    #[must_use]
    pub fn clipped_adamw() -> ClippedConfig<ParamsAdamW> {
        ClippedConfig {
            inner: adamw(),
            clip: Clip::value(0.75).non_finite(NonFinite::Propagate),
        }
    }
}

/// Calls a generic function `fn(&Row<O>) -> anyhow::Result<()>` with every row.
#[macro_export]
macro_rules! for_every_row {
    ($promise:path) => {
        for dtypes in $crate::registry::DTYPES {
            for backend in $crate::device::backends() {
                use $crate::registry::{Row, config};
                $promise(&Row::<candle_nn::SGD> {
                    optimizer: "candle SGD",
                    config: config::sgd,
                    dtypes,
                    backend,
                    fused: false,
                })?;
                $promise(&Row::<candle_nn::AdamW> {
                    optimizer: "candle AdamW",
                    config: config::adamw,
                    dtypes,
                    backend,
                    fused: false,
                })?;
                $promise(&Row::<$crate::optimizers::MomentumSgd> {
                    optimizer: "a user's momentum SGD",
                    config: config::momentum_sgd,
                    dtypes,
                    backend,
                    fused: false,
                })?;
                $promise(&Row::<candle_grad_clip::optim::Sgd> {
                    optimizer: "fused SGD",
                    config: config::fused_sgd,
                    dtypes,
                    backend,
                    fused: true,
                })?;
                $promise(&Row::<candle_grad_clip::optim::AdamW> {
                    optimizer: "fused AdamW",
                    config: config::adamw,
                    dtypes,
                    backend,
                    fused: true,
                })?;
                $promise(&Row::<$crate::registry::ClippedAdamW> {
                    optimizer: "clipped AdamW",
                    config: config::clipped_adamw,
                    dtypes,
                    backend,
                    fused: false,
                })?;
            }
        }
    };
}

/// The optimizer that is wrapped twice.
pub type ClippedAdamW = ClippedOptimizer<AdamW>;
