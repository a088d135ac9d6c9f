//! One training run: batches, loss, steps, evaluation.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, IndexOp, Module, Tensor};
use candle_grad_clip::loss::weighted_power;
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{ClippedOptimizer, Error, SkipReason, StepReport};
use candle_grad_clip_log::RunLog;
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::data::{Weather, Windows};
use crate::init;
use crate::model::Forecaster;
use crate::run::{Run, Step};
use crate::saves::Saves;
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

/// What a run may do beside training.
#[derive(Debug, Default)]
pub struct Extras<'a> {
    /// Writes down every step.
    pub log: Option<RunLog>,
    /// Logs a histogram of each gradient, before clipping, every so many steps.
    pub histograms: Option<usize>,
    /// Leaves checkpoints: one before the first step, or resumes from the latest.
    pub saves: Option<&'a Saves>,
    /// What the steps before that checkpoint did.
    pub before: Vec<Step>,
}

/// Trains a fresh model; `on_step` sees every step as it is done.
///
/// A loss or gradient that is not finite ends the run as diverged (unless the arm's policy deals
/// with it), which is no error. So does `interrupt`, after the step at hand. A resumed
/// run has all steps, as it would without the break; `on_step` sees only those after it.
///
/// # Errors
/// If the settings are refused, the device or `on_step` fails, the first checkpoint can't be saved,
/// or the one to resume from does not fit. A later checkpoint that can't be saved ends nothing: see
/// [`Run::unsaved`].
pub fn train(
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
            let optimizer = Sgd::from_named_vars(&trainer.varmap, params)?;
            trainer.run(optimizer, on_step)
        }
        OptimizerKind::AdamW => {
            let params = ParamsAdamW {
                lr,
                ..ParamsAdamW::default()
            };
            let optimizer = AdamW::from_named_vars(&trainer.varmap, params)?;
            trainer.run(optimizer, on_step)
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
    fn run<O: Optimizer + 'static>(
        mut self,
        optimizer: O,
        mut on_step: impl FnMut(&Step, &StepReport) -> Result<()>,
    ) -> Result<Run> {
        let clip = self.settings.arm.clip(self.settings.non_finite);
        let optimizer = ClippedOptimizer::wrap(optimizer, &self.varmap, clip)?;
        let mut optimizer = optimizer.with_param_norms(self.extras.log.is_some());
        let mut run = Run::new(self.settings.clone(), self.varmap.clone());
        run.steps = std::mem::take(&mut self.extras.before);
        if let Some(saves) = self.extras.saves {
            saves.start(&mut run, &mut optimizer)?;
        }
        let done = run.steps.len();
        if let Some(log) = &mut self.extras.log {
            log.describe(&optimizer)?;
            log.config(self.settings)?;
            log.total_steps(self.settings.steps as u64);
        }
        let batches = Batches::new(
            self.settings.seed,
            self.weather.train.len(),
            self.settings.batch,
        );
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
            self.log(&step, &report)?;
            on_step(&step, &report)?;
            if let Some(loss) = test_loss.filter(|loss| !loss.is_finite()) {
                run.diverged = Some(format!("step {}: the test loss is {loss}", step.step));
                break;
            }
            let is_last = step.step == self.settings.steps;
            run.interrupted = self.interrupt.load(Ordering::Relaxed) && !is_last;
            self.save_if_due(&mut run, &optimizer)?;
            if run.interrupted {
                break;
            }
        }
        if let Some(log) = self.extras.log {
            log.finish()?;
        }
        Ok(run)
    }

    /// One step: the batch's loss, and the report or why training can't go on.
    fn step<O: Optimizer + 'static>(
        &mut self,
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
        let wanted = |every: usize| step.is_multiple_of(every);
        let report = match &mut self.extras.log {
            Some(log) if self.extras.histograms.is_some_and(wanted) => {
                let grads = loss.backward()?;
                log.histograms(step as u64, optimizer.vars(), &grads)?;
                optimizer.step_report(&grads)
            }
            _ => optimizer.backward_step_report(&loss),
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

    fn log(&mut self, step: &Step, report: &StepReport) -> Result<()> {
        let Some(log) = &mut self.extras.log else {
            return Ok(());
        };
        log.step(report, step.train_loss)?;
        if let Some(loss) = step.test_loss {
            log.scalar("loss/test", step.step as u64, loss)?;
        }
        Ok(())
    }

    fn save_if_due<O: Optimizer + 'static>(
        &mut self,
        run: &mut Run,
        optimizer: &ClippedOptimizer<O>,
    ) -> Result<()> {
        let Some(saves) = self.extras.saves.filter(|saves| saves.is_due(run)) else {
            return Ok(());
        };
        if let Some(log) = &mut self.extras.log {
            log.flush()?; // or a kill after the save would cost steps of the log
        }
        saves.save(run, optimizer);
        Ok(())
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
