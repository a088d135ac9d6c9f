//! `run.json`: what was run.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use candle_grad_clip::ClippedOptimizer;
use candle_nn::Optimizer;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The name of the file in a run's folder.
pub(crate) const FILE_NAME: &str = "run.json";

const WRITTEN_BY: &str = env!("CARGO_PKG_NAME");

/// What was run, and how far it came.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunInfo {
    written_by: String,
    /// Of this crate and of candle-grad-clip, which have one version.
    pub(crate) version: String,
    pub(crate) system: String,
    pub(crate) state: State,
    /// The error that ended the run, if the program named it.
    #[serde(default)]
    pub(crate) stopped_by: Option<String>,
    /// Every start of a process.
    pub(crate) starts: Vec<Start>,
    pub(crate) total_steps: Option<u64>,
    pub(crate) optimizer: Option<OptimizerInfo>,
    pub(crate) config: serde_json::Value,
}

/// How far a run came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// It goes on, or was killed.
    Running,
    /// The log was dropped without `finish`.
    Stopped,
    Finished,
}

/// A start of a process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Start {
    /// The step after which it went on; 0 for a new run.
    pub(crate) after_step: u64,
    pub(crate) seconds_since_1970: u64,
}

/// What is known of an optimizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct OptimizerInfo {
    pub(crate) clip: String,
    pub(crate) max_norm: Option<f64>,
    /// `None` if JSON can't hold it.
    pub(crate) learning_rate: Option<f64>,
    pub(crate) device: String,
    pub(crate) vars: Vec<VarInfo>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct VarInfo {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: String,
}

impl OptimizerInfo {
    pub(crate) fn new<O: Optimizer + 'static>(optimizer: &ClippedOptimizer<O>) -> Self {
        let vars = optimizer.vars();
        let var = |(name, var): (&String, &candle_core::Var)| VarInfo {
            name: name.clone(),
            shape: var.dims().to_vec(),
            dtype: var.dtype().as_str().to_owned(),
        };
        let device = |var: &candle_core::Var| match var.device().location() {
            candle_core::DeviceLocation::Cpu => "CPU".to_owned(),
            candle_core::DeviceLocation::Cuda { gpu_id } => format!("CUDA GPU {gpu_id}"),
            candle_core::DeviceLocation::Metal { gpu_id } => format!("Metal GPU {gpu_id}"),
        };
        let mut devices: Vec<String> = vars.vars().iter().map(device).collect();
        devices.dedup();
        Self {
            clip: optimizer.clip().to_string(),
            max_norm: optimizer.clip().max_norm(),
            learning_rate: Some(optimizer.learning_rate()).filter(|rate| rate.is_finite()),
            device: devices.join(", "),
            vars: vars.names().iter().zip(vars.vars()).map(var).collect(),
        }
    }
}

impl RunInfo {
    /// A run that starts now.
    pub(crate) fn new() -> Self {
        let mut info = Self {
            written_by: WRITTEN_BY.into(),
            version: String::new(),
            system: String::new(),
            state: State::Running,
            stopped_by: None,
            starts: Vec::new(),
            total_steps: None,
            optimizer: None,
            config: serde_json::Value::Null,
        };
        info.start(0);
        info
    }

    /// A process goes on with the run.
    pub(crate) fn start(&mut self, after_step: u64) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        self.version = env!("CARGO_PKG_VERSION").into();
        self.system = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
        self.state = State::Running;
        self.stopped_by = None;
        self.starts.push(Start {
            after_step,
            seconds_since_1970: since.map_or(0, |since| since.as_secs()),
        });
    }

    /// `None` if there is no such file.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE_NAME);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        let not_ours = |what| Error::NotOurs {
            path: path.clone(),
            what,
        };
        let info: Self =
            serde_json::from_slice(&text).map_err(|error| not_ours(error.to_string()))?;
        if info.written_by != WRITTEN_BY {
            return Err(not_ours(format!("it is of {}", info.written_by)));
        }
        Ok(Some(info))
    }

    /// Replaces the file: a kill leaves the old or the new one.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE_NAME);
        let beside = folder.join(".run.json.tmp");
        let text = serde_json::to_vec_pretty(self).map_err(Error::Config)?;
        let written = fs::write(&beside, text).and_then(|()| fs::rename(&beside, &path));
        if written.is_err() {
            _ = fs::remove_file(&beside); // half a file is of no use
        }
        written.map_err(Error::io("write", &path))
    }
}
