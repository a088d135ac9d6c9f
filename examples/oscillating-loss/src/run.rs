//! What a run did, step by step.

use std::time::Duration;

use candle_nn::VarMap;
use serde::Serialize;

use crate::settings::Settings;

/// What one step did.
#[derive(Debug, Clone, Copy, Serialize)]
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
    /// Whether the step was skipped, for NaN or infinite gradients.
    pub skipped: bool,
}

/// A run that has ended.
pub struct Run {
    /// How it was to go.
    pub settings: Settings,
    /// What happened, step by step.
    pub steps: Vec<Step>,
    /// Why it ended early, if it diverged.
    pub diverged: Option<String>,
    /// Whether it was stopped by Ctrl-C or SIGTERM.
    pub interrupted: bool,
    /// Time in training steps, without the evaluations.
    pub training_time: Duration,
    /// Names of the Vars that the first step's gradients lacked.
    pub missing: Vec<String>,
    /// The weights at the end.
    pub weights: VarMap,
    /// Why its last checkpoint could not be saved.
    pub unsaved: Option<anyhow::Error>,
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Run({:?}, {} steps)", self.settings, self.steps.len())
    }
}

impl Run {
    /// A run before its first step.
    #[must_use]
    pub fn new(settings: Settings, weights: VarMap) -> Self {
        Self {
            settings,
            steps: Vec::new(),
            diverged: None,
            interrupted: false,
            training_time: Duration::ZERO,
            missing: Vec::new(),
            weights,
            unsaved: None,
        }
    }

    /// All test losses, in the order of the steps.
    #[must_use]
    pub fn test_losses(&self) -> Vec<f64> {
        self.steps
            .iter()
            .filter_map(|step| step.test_loss)
            .collect()
    }
}
