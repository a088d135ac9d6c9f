//! One training run: batches, loss, steps, evaluation.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, IndexOp, Module, Tensor};
use candle_grad_clip::loss::weighted_power;
use candle_grad_clip::optim::{self, AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{ClippedOptimizer, Error, NamedVars, SkipReason, StepReport};
use candle_nn::{ParamsAdamW, VarMap};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::checkpoint::Checkpoints;
use crate::data::{Weather, Windows};
use crate::init;
use crate::model::Forecaster;
use crate::param_norms::ParamNorms;
use crate::run::{Run, Step};
use crate::settings::{OptimizerKind, Settings};

/// Windows in one forward pass of an evaluation.
const TEST_BATCH: usize = 32;

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
/// A loss or gradient that is not finite ends the run as diverged (unless the arm's policy deals
/// with it), which is no error. So does `interrupt`, after the step at hand.
///
/// # Errors
/// If the settings are refused, the device fails, or `on_step` does.
pub fn train(
    settings: &Settings,
    weather: &Weather,
    interrupt: &AtomicBool,
    on_step: impl FnMut(&Step, &StepReport) -> Result<()>,
) -> Result<Run> {
    train_with(settings, weather, interrupt, Extras::default(), on_step)
}

/// What a run may do beside training.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extras<'a> {
    /// Leave checkpoints: one before the first step, or go on from one.
    pub checkpoints: Option<&'a Checkpoints>,
    /// Show gradients.
    pub gradients: Option<GradientWatch<'a>>,
}

/// Looks at gradients before they are clipped.
#[derive(Clone, Copy)]
pub struct GradientWatch<'a> {
    /// At each step that is a multiple of this.
    pub every: usize,
    /// Called with the step, and the Vars whose gradients they are.
    pub look: &'a dyn Fn(usize, &NamedVars, &GradStore) -> Result<()>,
}

impl std::fmt::Debug for GradientWatch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GradientWatch(every {})", self.every)
    }
}

/// As [`train`], with extras. A run that continues from a checkpoint shows `on_step` only the steps
/// after it; what the run says of all steps is what it would have been without a break.
///
/// # Errors
/// As [`train`], and if the first checkpoint can't be saved or the one to go on from doesn't fit,
/// or whoever looks at gradients fails. A later checkpoint that can't be saved ends nothing: see
/// [`Run::unsaved`].
pub fn train_with(
    settings: &Settings,
    weather: &Weather,
    interrupt: &AtomicBool,
    extras: Extras<'_>,
    on_step: impl FnMut(&Step, &StepReport) -> Result<()>,
) -> Result<Run> {
    let device = weather.train.x.device();
    let varmap = VarMap::new();
    let vb = init::seeded(&varmap, settings.seed, device);
    let model = Forecaster::with_features(weather.features.len(), vb)?;
    let trainer = Trainer {
        settings,
        weather,
        interrupt,
        extras,
        model,
        varmap,
    };
    let (lr, momentum) = (settings.lr, settings.momentum);
    match settings.optimizer {
        OptimizerKind::Sgd => {
            let params = ParamsSgd {
                lr,
                momentum,
                ..ParamsSgd::default()
            };
            trainer.run(Sgd::from_named_vars(&trainer.varmap, params)?, on_step)
        }
        OptimizerKind::AdamW => {
            let params = ParamsAdamW {
                lr,
                ..ParamsAdamW::default()
            };
            trainer.run(AdamW::from_named_vars(&trainer.varmap, params)?, on_step)
        }
    }
}

struct Trainer<'a> {
    settings: &'a Settings,
    weather: &'a Weather,
    interrupt: &'a AtomicBool,
    extras: Extras<'a>,
    model: Forecaster,
    varmap: VarMap,
}

impl Trainer<'_> {
    fn run<O: optim::Checkpoint>(
        &self,
        optimizer: O,
        mut on_step: impl FnMut(&Step, &StepReport) -> Result<()>,
    ) -> Result<Run> {
        let Settings {
            non_finite,
            seed,
            batch,
            ..
        } = *self.settings;
        let clip = self.settings.arm.clip(non_finite);
        let optimizer = ClippedOptimizer::wrap(optimizer, &self.varmap, clip)?;
        let mut optimizer = optimizer.with_param_norms(true);
        let mut run = Run::new(self.settings.clone(), self.varmap.clone());
        run.param_norms = ParamNorms::new(optimizer.vars().names());
        if let Some(checkpoints) = self.extras.checkpoints {
            checkpoints.begin(&mut run, &mut optimizer)?;
        }
        let batches = Batches::new(seed, self.weather.train.len(), batch);
        let done = run.steps.len();
        for (step, indices) in (1..=self.settings.steps).zip(batches).skip(done) {
            let start = Instant::now();
            let (train_loss, report) = self.step(&mut optimizer, step, &indices)?;
            let report = match report {
                Ok(report) => report,
                Err(why) => {
                    run.diverged = Some(format!("step {step}: {why}"));
                    break;
                }
            };
            run.training_time += start.elapsed();
            if step == 1 {
                run.missing = report.missing_grads().to_vec();
            }
            let test_loss = self.evaluate(step)?;
            let step = read(step, train_loss, test_loss, &report)?;
            run.steps.push(step);
            run.param_norms.add(&report)?;
            on_step(&step, &report)?;
            if let Some(loss) = test_loss.filter(|loss| !loss.is_finite()) {
                run.diverged = Some(format!("step {}: the test loss is {loss}", step.step));
                break;
            }
            let is_last = step.step == self.settings.steps;
            run.interrupted = self.interrupt.load(Ordering::Relaxed) && !is_last;
            if let Some(checkpoints) = self.extras.checkpoints.filter(|these| these.is_due(&run)) {
                // What the run has done so far is worth more than the checkpoint.
                let failed = checkpoints.save(&run, &optimizer).err();
                if let (Some(error), None) = (&failed, &run.unsaved) {
                    eprintln!("warning: {error:#}; the one before stays, and training goes on");
                }
                run.unsaved = failed;
            }
            if run.interrupted {
                break;
            }
        }
        Ok(run)
    }

    /// One step: the batch's loss, and the report or why training can't go on.
    fn step<O: optim::Checkpoint>(
        &self,
        optimizer: &mut ClippedOptimizer<O>,
        step: usize,
        indices: &[u32],
    ) -> Result<(f64, Result<StepReport, String>)> {
        let Settings { power, alpha, .. } = *self.settings;
        let loss = batch_loss(&self.model, &self.weather.train, indices, power, alpha)?;
        let train_loss = scalar(&loss)?;
        if self.settings.arm.is_none() && !train_loss.is_finite() {
            return Ok((train_loss, Err(format!("the loss is {train_loss}"))));
        }
        let watch = self.extras.gradients;
        let report = match watch.filter(|watch| step.is_multiple_of(watch.every)) {
            None => optimizer.backward_step_report(&loss),
            Some(watch) => {
                let grads = loss.backward()?;
                (watch.look)(step, optimizer.vars(), &grads)?;
                optimizer.step_report(&grads)
            }
        };
        match report {
            Ok(report) => Ok((train_loss, Ok(report))),
            Err(
                error @ (Error::NonFinite { .. }
                | Error::TooManySkips {
                    reason: SkipReason::NonFinite,
                    ..
                }),
            ) => Ok((train_loss, Err(error.to_string()))),
            Err(error) => Err(error.into()),
        }
    }

    fn evaluate(&self, step: usize) -> Result<Option<f64>> {
        let Settings { power, alpha, .. } = *self.settings;
        if !self.settings.evaluates(step) {
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
        clipped_norm: report.record()?.clipped_norm,
        clip_coef: report.clip_coef()?,
        was_clipped: report.was_clipped()?,
        skipped: report.skipped()?,
    })
}
