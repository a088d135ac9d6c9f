//! Everything that decides how a run goes, and where.

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use candle_grad_clip::{Clip, NonFinite};
use serde::{Deserialize, Serialize};

use crate::arm::Arm;

/// The library's fused optimizers; without momentum they do what candle's do, to the bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Gradient descent: the step is as long as the gradient says.
    Sgd,
    /// Adam with decoupled weight decay (candle's default, 0.01): rescales every gradient anyway.
    #[value(name = "adamw")]
    AdamW,
}

impl OptimizerKind {
    /// As people write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sgd => "SGD",
            Self::AdamW => "AdamW",
        }
    }
}

/// Everything that decides how a run goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// What is done to the gradients.
    pub arm: Arm,
    /// What an arm that clips does with NaN and infinite gradients.
    pub non_finite: NonFinite,
    /// Which optimizer.
    pub optimizer: OptimizerKind,
    /// What SGD keeps of its earlier steps; 0 for `AdamW`.
    pub momentum: f64,
    /// Learning rate.
    pub lr: f64,
    /// Exponent of the loss.
    pub power: f64,
    /// How much more extreme targets weigh: w = 1 + alpha |y|.
    pub alpha: f64,
    /// Windows a step.
    pub batch: usize,
    /// Steps to take.
    pub steps: usize,
    /// Steps between evaluations on all test windows.
    pub eval_every: usize,
    /// Decides initial weights and batches.
    pub seed: u64,
}

/// The run that all commands start from: plain SGD without clipping, on the loss of power 4.
impl Default for Settings {
    fn default() -> Self {
        Self {
            arm: Clip::none().into(),
            non_finite: NonFinite::SkipStep,
            optimizer: OptimizerKind::Sgd,
            momentum: 0.0,
            lr: 3e-3,
            power: 4.0,
            alpha: 4.0,
            batch: 32,
            steps: 500,
            eval_every: 25,
            seed: 0,
        }
    }
}

impl Settings {
    /// The optimizer as people write it, with its momentum if it has one.
    #[must_use]
    pub fn optimizer_name(&self) -> String {
        let name = self.optimizer.name();
        if self.momentum == 0.0 {
            return name.to_owned();
        }
        format!("{name} with momentum {}", self.momentum)
    }

    /// Whether a step is followed by an evaluation on the test windows.
    #[must_use]
    pub fn evaluates(&self, step: usize) -> bool {
        step.is_multiple_of(self.eval_every) || step == self.steps
    }

    /// Finds what no single option shows.
    ///
    /// # Errors
    /// A momentum for an optimizer that takes none.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.optimizer == OptimizerKind::Sgd || self.momentum == 0.0,
            "--momentum {} only goes with --optimizer sgd: AdamW has its own (beta1, 0.9)",
            self.momentum
        );
        Ok(())
    }
}

/// The CPU, or the first GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Always there.
    Cpu,
    /// Needs `--features cuda`.
    Cuda,
    /// Needs `--features metal`.
    Metal,
}

impl DeviceKind {
    /// Opens the device.
    ///
    /// # Errors
    /// If this build has no support for it, or the machine has none.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => Device::new_cuda(0)
                .context("no CUDA device: build with `--features cuda`, on a machine with one"),
            Self::Metal => Device::new_metal(0)
                .context("no Metal device: build with `--features metal`, on a machine with one"),
        }
    }
}
