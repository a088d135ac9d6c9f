//! What a clipping rule is: the plain config of a method, and the rule at work that it starts.

use std::fmt;
use std::sync::Arc;

use super::coef::CLIP_EPS;
use super::decision::{Decision, Given};
use super::non_finite::NonFinite;
use super::options::{Options, Writer};
use crate::error::Result;
use crate::gradients::{Measurements, UnitPlan};
use crate::vars::NamedVars;

/// The config of a method: plain data. Each method is a file of this folder and a row of the table
/// in `methods.rs`.
pub(super) trait Method {
    /// From the options of a text, which are checked later.
    fn parse(options: &mut Options<'_>) -> Result<Self>
    where
        Self: Sized;

    /// Writes the options that are not at their default.
    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result;

    /// What is added to norms, where nothing else is said.
    fn default_eps(&self) -> f64 {
        CLIP_EPS
    }

    /// Checks every field. Of any method `eps` is 0 or above.
    fn check(&self, eps: f64) -> Result<()>;

    /// What it may change.
    fn scope(&self) -> Scope {
        Scope::Vars
    }

    /// The rule at work, which remembers nothing yet.
    fn start(&self) -> Box<dyn Rule>;

    /// The limit that a schedule can set.
    fn limit(&mut self) -> Option<Limit<'_>> {
        None
    }

    /// The limit of the global norm, if there is nothing else to decide by: then a GPU can.
    /// Infinite for none.
    fn device_max_norm(&self) -> Option<f64> {
        None
    }

    /// The units of `vars`, if it needs them measured.
    fn unit_plan(&self, _vars: &NamedVars) -> Result<Option<Arc<UnitPlan>>> {
        Ok(None)
    }
}

/// What a method may change: on that hangs what it can follow, and whether it can stand beside
/// groups with settings of their own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scope {
    Nothing,
    /// It multiplies all Vars, or each of them.
    Vars,
    /// It clamps elements.
    Elements {
        clip_value: f64,
    },
    /// It multiplies units of Vars.
    Units {
        clipping: f64,
    },
}

/// A limit that a schedule can set: its kind and its name.
pub(super) type Limit<'a> = (LimitKind, &'static str, &'a mut f64);

/// Of several limits that of the first kind is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LimitKind {
    MaxNorm,
    /// Of a rule that does something else first.
    SideMaxNorm,
    Other,
}

/// A rule at work, with what it remembers of the steps that were taken: a built-in method, or a
/// [`ClipRule`](crate::ClipRule).
pub(super) trait Rule: Send + Sync {
    /// Asked before [`decide`](Self::decide): a bound that the gradients are to be measured with as
    /// well.
    fn ask(&mut self, _asked: &Asked<'_>) -> Result<Option<f64>> {
        Ok(None)
    }

    /// What is to be done. What the step adds to the history is kept apart, until
    /// [`observe`](Self::observe).
    fn decide(&mut self, given: &Given<'_>) -> Decision;

    /// The step was taken as last decided. Not called for a step that was skipped or failed.
    fn observe(&mut self) {}

    /// Whether it looks at the loss.
    fn reads_loss(&self) -> bool {
        false
    }

    /// Sets the [`Limit`] of its config.
    fn set_limit(&mut self, _value: f64) {}

    /// What checkpoints keep of it: finite numbers.
    fn save(&self) -> Saved {
        Saved::default()
    }

    /// Goes on from what [`save`](Self::save) returned, of the same method with perhaps other
    /// settings.
    ///
    /// # Errors
    /// What is wrong with the numbers. The rule must then be as it was.
    fn load(&mut self, _saved: &Saved) -> std::result::Result<(), String> {
        Err("the clip's history has numbers of a rule that keeps none".to_string())
    }
}

/// What a rule may look at when it is asked for a bound.
pub(super) struct Asked<'a> {
    pub(super) measured: &'a Measurements<'a>,
    pub(super) non_finite: NonFinite,
    pub(super) names: &'a Arc<[String]>,
    /// The step's number.
    pub(super) step: u64,
}

/// What a rule remembers, as numbers. Empty for nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Saved {
    pub(super) numbers: Vec<f64>,
    /// One for each Var, in their order; 0 for none.
    pub(super) of_vars: Vec<f64>,
}

impl Saved {
    pub(super) fn numbers(numbers: Vec<f64>) -> Self {
        Self {
            numbers,
            of_vars: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.numbers.is_empty() && self.of_vars.is_empty()
    }

    /// The numbers of a rule that keeps none of single Vars.
    pub(super) fn only_numbers(&self) -> std::result::Result<&[f64], String> {
        if self.of_vars.is_empty() {
            return Ok(&self.numbers);
        }
        Err("the clip's history has numbers of Vars, expected none".to_string())
    }
}
