//! One training run: batches, loss, steps, evaluation.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::{DType, Device, IndexOp, Module, Tensor};
use candle_grad_clip::loss::weighted_power;
use candle_grad_clip::{ClippedOptimizer, Error, NonFinite, StepReport, Summary};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD, VarMap};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use serde::Serialize;

use crate::arm::Arm;
use crate::data::{Weather, Windows};
use crate::model::Forecaster;
use crate::{init, score};

/// Windows in one forward pass of an evaluation.
const TEST_BATCH: usize = 32;

/// candle's optimizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Plain gradient descent: the step is as long as the gradient says.
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
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Settings {
    /// What is done to the gradients.
    pub arm: Arm,
    /// What an arm that clips does with NaN and infinite gradients.
    pub non_finite: NonFinite,
    /// Which of candle's optimizers.
    pub optimizer: OptimizerKind,
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

/// What one step did.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// 1 for the first.
    pub step: usize,
    /// Loss of the batch, before the step.
    pub train_loss: f64,
    /// Loss on all test windows after the step, where it was evaluated.
    pub test_loss: Option<f64>,
    /// Norm of all gradients before clipping.
    pub total_norm: f64,
    /// The same after clipping.
    pub clipped_norm: f64,
    /// What norm clipping multiplied by; 1 where it did nothing.
    pub clip_coef: f64,
    /// Whether clipping changed the gradients.
    pub was_clipped: bool,
    /// Whether the step was not taken, for NaN or infinite gradients.
    pub skipped: bool,
}

/// A run that has ended.
#[derive(Debug)]
pub struct Run {
    /// How it was to go.
    pub settings: Settings,
    /// What happened, step by step.
    pub steps: Vec<Step>,
    /// Why it ended early, if it diverged.
    pub diverged: Option<String>,
    /// Whether it was stopped by Ctrl-C.
    pub interrupted: bool,
    /// Time in training steps, without the evaluations.
    pub training_time: Duration,
    /// Names of the Vars that the first step's gradients lacked.
    pub missing: Vec<String>,
    /// All norms, and how often clipping acted.
    pub clipping: Summary,
    /// The weights at the end.
    pub weights: Weights,
}

/// The Vars of a model, by name.
pub struct Weights(pub VarMap);

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weights({} Vars)", self.0.all_vars().len())
    }
}

impl Run {
    /// All test losses, in the order of the steps.
    #[must_use]
    pub fn test_losses(&self) -> Vec<f64> {
        self.steps
            .iter()
            .filter_map(|step| step.test_loss)
            .collect()
    }

    /// The lowest test loss; infinite for a run that diverged, whatever it had reached before.
    #[must_use]
    pub fn best_test_loss(&self) -> f64 {
        if self.diverged.is_some() {
            return f64::INFINITY;
        }
        self.test_losses().into_iter().fold(f64::INFINITY, f64::min)
    }

    /// The test loss at the end; NaN for a run that diverged.
    #[must_use]
    pub fn final_test_loss(&self) -> f64 {
        if self.diverged.is_some() {
            return f64::NAN;
        }
        self.test_losses().last().copied().unwrap_or(f64::NAN)
    }

    /// See [`score::roughness`].
    #[must_use]
    pub fn roughness(&self) -> Option<f64> {
        score::roughness(&self.test_losses()).filter(|_| self.diverged.is_none())
    }

    /// The largest finite norm before clipping.
    #[must_use]
    pub fn max_total_norm(&self) -> f64 {
        let norms = self.steps.iter().map(|step| step.total_norm);
        norms.filter(|norm| norm.is_finite()).fold(0.0, f64::max)
    }

    /// The share of steps whose gradients clipping changed.
    #[must_use]
    pub fn clipped_fraction(&self) -> f64 {
        self.clipping.clipped_fraction()
    }

    /// Mean time of a training step.
    #[must_use]
    pub fn ms_per_step(&self) -> f64 {
        self.training_time.as_secs_f64() * 1e3 / self.steps.len().max(1) as f64
    }
}

/// An endless stream of batches: window numbers drawn from a seed, with replacement.
#[derive(Debug)]
pub struct Batches {
    rng: Pcg64,
    windows: u32,
    batch: usize,
}

impl Batches {
    /// Batches of `batch` out of `windows`; the stream is not the one of the initial weights.
    #[must_use]
    pub fn new(seed: u64, windows: usize, batch: usize) -> Self {
        let rng = Pcg64::seed_from_u64(seed ^ 0x5eed_0fba_7c4e_5000);
        Self {
            rng,
            windows: windows as u32,
            batch,
        }
    }
}

impl Iterator for Batches {
    type Item = Vec<u32>;

    fn next(&mut self) -> Option<Vec<u32>> {
        Some(
            (0..self.batch)
                .map(|_| self.rng.random_range(0..self.windows))
                .collect(),
        )
    }
}

/// mean((1 + alpha |y|) |forecast - y|^power) over all days of the windows.
///
/// # Errors
/// If shapes or devices don't fit.
pub fn windows_loss(
    model: &Forecaster,
    x: &Tensor,
    y: &Tensor,
    power: f64,
    alpha: f64,
) -> Result<Tensor> {
    let weight = y.abs()?.affine(alpha, 1.0)?;
    Ok(weighted_power(&model.forward(x)?, y, &weight, power)?)
}

/// The loss of the windows with these numbers.
///
/// # Errors
/// If a number is past the last window.
pub fn batch_loss(
    model: &Forecaster,
    windows: &Windows,
    indices: &[u32],
    power: f64,
    alpha: f64,
) -> Result<Tensor> {
    let indices = Tensor::new(indices, windows.x.device())?;
    let (x, y) = (
        windows.x.index_select(&indices, 0)?,
        windows.y.index_select(&indices, 0)?,
    );
    windows_loss(model, &x, &y, power, alpha)
}

/// The loss over all windows.
///
/// # Errors
/// If the device fails.
pub fn full_loss(model: &Forecaster, windows: &Windows, power: f64, alpha: f64) -> Result<f64> {
    let mut sum = 0.0;
    for start in (0..windows.len()).step_by(TEST_BATCH) {
        let end = windows.len().min(start + TEST_BATCH);
        let (x, y) = (windows.x.i(start..end)?, windows.y.i(start..end)?);
        sum += scalar(&windows_loss(model, &x, &y, power, alpha)?)? * (end - start) as f64;
    }
    Ok(sum / windows.len() as f64)
}

fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(loss.to_dtype(DType::F64)?.to_scalar()?)
}

/// Trains a fresh model; `on_step` sees every step as it is done.
///
/// A loss or gradient that is not finite ends the run as diverged (unless the arm's policy deals with
/// it), which is no error. So does `interrupt`, after the step at hand.
///
/// # Errors
/// If the settings are refused, the device fails, or `on_step` does.
pub fn train(
    settings: &Settings,
    weather: &Weather,
    interrupt: &AtomicBool,
    on_step: impl FnMut(&Step) -> Result<()>,
) -> Result<Run> {
    let device = weather.train.x.device();
    let varmap = VarMap::new();
    let vb = init::seeded(&varmap, settings.seed, device);
    let model = Forecaster::with_features(weather.features.len(), vb)?;
    let trainer = Trainer {
        settings,
        weather,
        interrupt,
        model,
        varmap,
    };
    let vars = trainer.varmap.all_vars();
    match settings.optimizer {
        OptimizerKind::Sgd => trainer.run(SGD::new(vars, settings.lr)?, on_step),
        OptimizerKind::AdamW => {
            let params = ParamsAdamW {
                lr: settings.lr,
                ..ParamsAdamW::default()
            };
            trainer.run(AdamW::new(vars, params)?, on_step)
        }
    }
}

struct Trainer<'a> {
    settings: &'a Settings,
    weather: &'a Weather,
    interrupt: &'a AtomicBool,
    model: Forecaster,
    varmap: VarMap,
}

impl Trainer<'_> {
    fn run<O: Optimizer + 'static>(
        self,
        optimizer: O,
        mut on_step: impl FnMut(&Step) -> Result<()>,
    ) -> Result<Run> {
        let Settings {
            arm,
            non_finite,
            seed,
            batch,
            ..
        } = *self.settings;
        let mut optimizer = ClippedOptimizer::wrap(optimizer, &self.varmap, arm.clip(non_finite))?;
        let mut run = Run {
            settings: *self.settings,
            steps: Vec::with_capacity(self.settings.steps),
            diverged: None,
            interrupted: false,
            training_time: Duration::ZERO,
            missing: Vec::new(),
            clipping: Summary::default(),
            weights: Weights(self.varmap.clone()),
        };
        let batches = Batches::new(seed, self.weather.train.len(), batch);
        for (step, indices) in (1..=self.settings.steps).zip(batches) {
            let start = Instant::now();
            let (train_loss, report) = self.step(&mut optimizer, &indices)?;
            let report = match report {
                Ok(report) => report,
                Err(why) => {
                    run.diverged = Some(format!("step {step}: {why}"));
                    break;
                }
            };
            run.training_time += start.elapsed();
            run.clipping.add(&report)?;
            if step == 1 {
                run.missing = report.missing().to_vec();
            }
            let test_loss = self.evaluate(step)?;
            let step = read(step, train_loss, test_loss, &report)?;
            run.steps.push(step);
            on_step(&step)?;
            if let Some(loss) = test_loss.filter(|loss| !loss.is_finite()) {
                run.diverged = Some(format!("step {}: the test loss is {loss}", step.step));
                break;
            }
            if self.interrupt.load(Ordering::Relaxed) {
                run.interrupted = step.step < self.settings.steps;
                break;
            }
        }
        Ok(run)
    }

    /// One step: the batch's loss, and the report or why training can't go on.
    fn step<O: Optimizer + 'static>(
        &self,
        optimizer: &mut ClippedOptimizer<O>,
        indices: &[u32],
    ) -> Result<(f64, Result<StepReport, String>)> {
        let Settings {
            arm, power, alpha, ..
        } = *self.settings;
        let loss = batch_loss(&self.model, &self.weather.train, indices, power, alpha)?;
        let train_loss = scalar(&loss)?;
        if arm == Arm::None && !train_loss.is_finite() {
            return Ok((train_loss, Err(format!("the loss is {train_loss}"))));
        }
        match optimizer.backward_step_report(&loss) {
            Ok(report) => Ok((train_loss, Ok(report))),
            Err(error @ (Error::NonFinite { .. } | Error::TooManySkips { .. })) => {
                Ok((train_loss, Err(error.to_string())))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn evaluate(&self, step: usize) -> Result<Option<f64>> {
        let Settings {
            power,
            alpha,
            steps,
            eval_every,
            ..
        } = *self.settings;
        if !step.is_multiple_of(eval_every) && step != steps {
            return Ok(None);
        }
        full_loss(&self.model, &self.weather.test, power, alpha).map(Some)
    }
}

fn read(step: usize, train_loss: f64, test_loss: Option<f64>, report: &StepReport) -> Result<Step> {
    Ok(Step {
        step,
        train_loss,
        test_loss,
        total_norm: report.total_norm()?,
        clipped_norm: report.clipped_norm()?,
        clip_coef: report.clip_coef()?,
        was_clipped: report.was_clipped()?,
        skipped: report.skipped()?,
    })
}

/// The CPU, or the first GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
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
        use anyhow::Context;
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => Device::new_cuda(0)
                .context("no CUDA device: build with `--features cuda`, on a machine with one"),
            Self::Metal => Device::new_metal(0)
                .context("no Metal device: build with `--features metal`, on a machine with one"),
        }
    }
}
