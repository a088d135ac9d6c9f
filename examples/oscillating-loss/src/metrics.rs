//! `metrics.csv`: a line a step of every run.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::run::Run;
use crate::settings::OptimizerKind;

#[derive(Serialize)]
struct Row {
    arm: String,
    optimizer: OptimizerKind,
    power: f64,
    lr: f64,
    seed: u64,
    step: usize,
    train_loss: f64,
    /// Empty where it was not evaluated.
    test_loss: Option<f64>,
    total_norm: f64,
    clipped_norm: f64,
    clip_coef: f64,
    was_clipped: u8,
    skipped: u8,
}

/// Writes all steps of all runs.
///
/// # Errors
/// If the file can't be written.
pub fn write_csv(path: &Path, runs: &[Run]) -> Result<()> {
    let mut writer = csv::Writer::from_path(path)?;
    for run in runs {
        for step in &run.steps {
            writer.serialize(Row {
                arm: run.settings.arm.to_string(),
                optimizer: run.settings.optimizer,
                power: run.settings.power,
                lr: run.settings.lr,
                seed: run.settings.seed,
                step: step.step,
                train_loss: step.train_loss,
                test_loss: step.test_loss,
                total_norm: step.total_norm,
                clipped_norm: step.clipped_norm,
                clip_coef: step.clip_coef,
                was_clipped: step.was_clipped.into(),
                skipped: step.skipped.into(),
            })?;
        }
    }
    Ok(writer.flush()?)
}
