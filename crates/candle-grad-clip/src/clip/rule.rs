//! The two traits of a clipping method: its config, and the running rule that the config starts.

use std::fmt;
use std::sync::Arc;

use super::coef::CLIP_EPS;
use super::decision::{Decision, Given};
use super::non_finite::NonFinite;
use super::options::{Options, Writer};
use crate::error::Result;
use crate::gradients::{Measurements, UnitPlan};
use crate::vars::NamedVars;

/// The config of a method: plain data. Each method is a file of this folder and a row in the table
/// of `methods.rs`.
pub(super) trait Method {
    /// Parses the options of a text. They are checked later.
    fn parse(options: &mut Options<'_>) -> Result<Self>
    where
        Self: Sized;

    /// Writes the options that differ from their defaults.
    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result;

    /// The default of [`Clip::eps`](crate::Clip::eps).
    fn default_eps(&self) -> f64 {
        CLIP_EPS
    }

    /// Checks every field. The caller checks that `eps` is 0 or above.
    fn check(&self, eps: f64) -> Result<()>;

    /// What the method may change.
    fn scope(&self) -> Scope {
        Scope::Vars
    }

    /// Starts the rule, with an empty history.
    fn start(&self) -> Box<dyn Rule>;

    /// Whether a tiny coefficient is no sign of a limit that is too low.
    fn sets_lengths(&self) -> bool {
        false
    }

    /// The limit that a schedule can set.
    fn limit(&mut self) -> Option<Limit<'_>> {
        None
    }

    /// The limit of the global norm, if nothing else decides, so that a GPU can decide. Infinite
    /// for none.
    fn device_max_norm(&self) -> Option<f64> {
        None
    }

    /// The units of `vars`, if the method needs their norms.
    fn unit_plan(&self, _vars: &NamedVars) -> Result<Option<Arc<UnitPlan>>> {
        Ok(None)
    }
}

/// What a method may change. This decides what it can follow in a chain, and whether it works with
/// groups that have a `max_norm` or `no_clip`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scope {
    Nothing,
    /// Scales all Vars, or each Var.
    Vars,
    /// Clamps elements.
    Elements {
        clip_value: f64,
    },
    /// Scales units of Vars.
    Units {
        clipping: f64,
    },
}

/// A limit that a schedule can set: its kind, its name and its value.
pub(super) type Limit<'a> = (LimitKind, &'static str, &'a mut f64);

/// The kind of a limit. Of several limits, a schedule sets the one with the first kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LimitKind {
    MaxNorm,
    /// The `max_norm` of a rule that mainly does something else.
    SideMaxNorm,
    Other,
}

/// A running rule with its history of the taken steps: a built-in method, or a
/// [`ClipRule`](crate::ClipRule).
pub(super) trait Rule: Send + Sync {
    /// Called before [`decide`](Self::decide). Returns a bound to measure the gradients with as
    /// well.
    fn ask(&mut self, _asked: &Asked<'_>) -> Result<Option<f64>> {
        Ok(None)
    }

    /// Decides the step. The history changes only in [`observe`](Self::observe).
    fn decide(&mut self, given: &Given<'_>) -> Decision;

    /// Called after the step was taken as last decided. Not called for a skipped or failed step.
    fn observe(&mut self) {}

    /// Whether it needs the loss.
    fn reads_loss(&self) -> bool {
        false
    }

    /// Sets the [`Limit`] of its config.
    fn set_limit(&mut self, _value: f64) {}

    /// The state to save in checkpoints: finite numbers.
    fn save(&self) -> Saved {
        Saved::default()
    }

    /// Restores the state that [`save`](Self::save) returned, from the same method with possibly
    /// other settings.
    ///
    /// # Errors
    /// What is wrong with the numbers. The rule must then be unchanged.
    fn load(&mut self, _saved: &Saved) -> std::result::Result<(), String> {
        Err("the clip's history has numbers of a rule that keeps none".to_string())
    }
}

/// The input of [`Rule::ask`].
pub(super) struct Asked<'a> {
    pub(super) measured: &'a Measurements<'a>,
    pub(super) non_finite: NonFinite,
    pub(super) names: &'a Arc<[String]>,
    /// The step's number.
    pub(super) step: u64,
}

/// A rule's state, as numbers. Empty for none.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Saved {
    pub(super) numbers: Vec<f64>,
    /// The numbers of each Var, in the order of the Vars; empty for none.
    pub(super) of_vars: Vec<Vec<f64>>,
}

impl Saved {
    pub(super) fn numbers(numbers: Vec<f64>) -> Self {
        Self {
            numbers,
            of_vars: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.numbers.is_empty() && self.of_vars.iter().all(Vec::is_empty)
    }

    /// The numbers of a rule that has none for each Var.
    pub(super) fn only_numbers(&self) -> std::result::Result<&[f64], String> {
        if self.of_vars.is_empty() {
            return Ok(&self.numbers);
        }
        Err("the clip's history has numbers of Vars, expected none".to_string())
    }
}
