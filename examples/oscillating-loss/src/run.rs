//! What a run did, step by step.

use std::time::Duration;

use candle_nn::VarMap;
use serde::{Deserialize, Serialize};

use crate::param_norms::ParamNorms;
use crate::score;
use crate::settings::Settings;

/// What one step did.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
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
    /// Whether it was stopped by Ctrl-C or SIGTERM.
    pub interrupted: bool,
    /// Time in training steps, without the evaluations.
    pub training_time: Duration,
    /// The norm of each Var's gradient, for each of `steps`.
    pub param_norms: ParamNorms,
    /// Names of the Vars that the first step's gradients lacked.
    pub missing: Vec<String>,
    /// The weights at the end.
    pub weights: Weights,
    /// Why its last checkpoint could not be saved.
    pub unsaved: Option<anyhow::Error>,
}

/// The Vars of a model, by name.
pub struct Weights(pub VarMap);

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weights({} Vars)", self.0.all_vars().len())
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
            param_norms: ParamNorms::default(),
            missing: Vec::new(),
            weights: Weights(weights),
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
        let clipped = self.steps.iter().filter(|step| step.was_clipped).count();
        clipped as f64 / self.steps.len().max(1) as f64
    }

    /// Mean time of a training step.
    #[must_use]
    pub fn ms_per_step(&self) -> f64 {
        self.training_time.as_secs_f64() * 1e3 / self.steps.len().max(1) as f64
    }
}
