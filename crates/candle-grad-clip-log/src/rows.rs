//! The rows of the CSV files.

use std::path::Path;

use candle_grad_clip::{SkipReason, StepRecord};
use serde::{Deserialize, Serialize};

use crate::csv_file::{self, Row};
use crate::error::Result;

/// A step, as `metrics.csv` has it. Floats are written so that they are read back to the last bit;
/// flags are 0 and 1.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MetricsRow {
    /// The step's number, from 1.
    pub step: u64,
    /// The loss; `None`, an empty field, where none was given.
    pub loss: Option<f64>,
    /// The norm of all gradients before clipping.
    pub total_norm: f64,
    /// The norm after clipping; 0 for a skipped step.
    pub clipped_norm: f64,
    /// The factor of the gradients.
    pub clip_coef: f64,
    /// The limit of the norm, if the clip has a fixed one.
    pub limit: Option<f64>,
    /// Whether clipping changed anything.
    #[serde(with = "flag")]
    pub was_clipped: bool,
    /// Whether the step was skipped.
    #[serde(with = "flag")]
    pub skipped: bool,
    /// Why the step was skipped.
    pub skip_reason: Option<SkipReason>,
    /// The number of NaN and infinite elements in all gradients.
    pub non_finite: u64,
    /// The number of Vars without a gradient.
    pub missing_grads: u64,
    /// Seconds since the start of the run, to the millisecond, without the time between a stop and
    /// a resume.
    pub seconds: f64,
}

impl Row for MetricsRow {
    const COLUMNS: &'static [&'static str] = &[
        "step",
        "loss",
        "total_norm",
        "clipped_norm",
        "clip_coef",
        "limit",
        "was_clipped",
        "skipped",
        "skip_reason",
        "non_finite",
        "missing_grads",
        "seconds",
    ];
}

impl MetricsRow {
    pub(crate) fn new(
        record: &StepRecord,
        step: u64,
        loss: Option<f64>,
        limit: Option<f64>,
        seconds: f64,
    ) -> Self {
        Self {
            step,
            loss,
            total_norm: record.total_norm,
            clipped_norm: record.clipped_norm,
            clip_coef: record.clip_coef,
            limit,
            was_clipped: record.was_clipped,
            skipped: record.skipped,
            skip_reason: record.skip_reason,
            non_finite: record.non_finite,
            missing_grads: record.missing_grads.len() as u64,
            seconds: (seconds * 1e3).round() / 1e3,
        }
    }
}

/// A value of [`RunLog::scalar`](crate::RunLog::scalar), as `scalars.csv` has it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ScalarRow {
    /// The step that it belongs to.
    pub step: u64,
    /// Its name, for example "loss/test".
    pub name: String,
    /// The value.
    pub value: f64,
}

impl Row for ScalarRow {
    const COLUMNS: &'static [&'static str] = &["step", "name", "value"];
}

impl ScalarRow {
    pub(crate) fn new(step: u64, name: &str, value: f64) -> Self {
        Self {
            step,
            name: name.to_owned(),
            value,
        }
    }
}

/// The norms of one Var in one bin of steps, as `param_norms.csv` has it. The rows of a bin stand
/// together; later bins may be wider.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ParamNormsRow {
    /// The first step of the bin.
    pub first_step: u64,
    /// The last one.
    pub last_step: u64,
    /// The name of the Var.
    pub name: String,
    /// In how many steps it had a gradient. Vars that had none in all of the bin have no row.
    pub steps: u64,
    /// The root of the mean square of the norms; NaN or infinite if one of them is.
    pub rms: f64,
    /// The largest norm; NaN if one of them is.
    pub largest: f64,
}

impl Row for ParamNormsRow {
    const COLUMNS: &'static [&'static str] =
        &["first_step", "last_step", "name", "steps", "rms", "largest"];
}

/// Reads a `metrics.csv`. A row that is still being written is left out.
///
/// # Errors
/// If the file can't be read, or is something else.
pub fn read_metrics(path: impl AsRef<Path>) -> Result<Vec<MetricsRow>> {
    csv_file::read(path.as_ref())
}

/// Reads a `scalars.csv`. A row that is still being written is left out.
///
/// # Errors
/// If the file can't be read, or is something else.
pub fn read_scalars(path: impl AsRef<Path>) -> Result<Vec<ScalarRow>> {
    csv_file::read(path.as_ref())
}

/// Reads a `param_norms.csv`. A row that is still being written is left out.
///
/// # Errors
/// If the file can't be read, or is something else.
pub fn read_param_norms(path: impl AsRef<Path>) -> Result<Vec<ParamNormsRow>> {
    csv_file::read(path.as_ref())
}

/// Flags as 0 and 1, which every program can draw.
mod flag {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    // serde passes a reference.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    pub(super) fn serialize<S: Serializer>(flag: &bool, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8((*flag).into())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
        match u8::deserialize(from)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(D::Error::custom(format!("expected 0 or 1, got {other}"))),
        }
    }
}
