//! The header of a checkpoint: JSON in the metadata of the safetensors file.

use std::collections::HashSet;

use candle_core::Var;
use serde::{Deserialize, Serialize};

use super::fault::{Checked, Fault};
use super::file::{FORMAT, Metadata, VERSION, hex};
use crate::clip::Clip;
use crate::clip::record::RuleRecord;
use crate::groups::ParamGroups;
use crate::loss_scaler::{LossScaler, Scaling};
use crate::optim::{ParamStates, Settings, Snapshot};

/// The largest step counter, so that none overflows.
pub(super) const MAX_STEPS: u64 = 1 << 53;
/// The largest step counter in a loaded file, so that training can go on and save again.
pub(super) const MAX_STEPS_LOADED: u64 = MAX_STEPS / 2;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CheckpointHeader {
    pub(super) optimizer: Settings,
    /// Steps taken.
    pub(super) steps: u64,
    pub(super) vars: Vec<VarRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) groups: Vec<String>,
    /// The second optimizer of a pair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) second: Option<OptimizerRecord>,
    /// Only if a wrapper saved the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) wrapper: Option<WrapperRecord>,
    /// Whether the state may be NaN or infinite.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) non_finite: bool,
}

/// The second optimizer of a pair. The first is in the header itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OptimizerRecord {
    pub(super) optimizer: Settings,
    pub(super) steps: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) groups: Vec<String>,
}

/// One optimizer to save or load.
pub(super) struct Part<'a> {
    pub(super) trained: &'a ParamStates,
    pub(super) settings: Settings,
    /// The groups as text. A file with others does not fit.
    pub(super) groups: Vec<String>,
}

impl<'a> Part<'a> {
    pub(super) fn new(trained: &'a ParamStates, settings: Settings) -> Self {
        Self {
            trained,
            settings,
            groups: describe_groups(trained.groups()),
        }
    }
}

/// One optimizer, or the two of a pair.
pub(super) struct Parts<'a> {
    pub(super) first: Part<'a>,
    pub(super) second: Option<Part<'a>>,
}

impl<'a> Parts<'a> {
    pub(super) fn one(trained: &'a ParamStates, settings: Settings) -> Self {
        Self {
            first: Part::new(trained, settings),
            second: None,
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Part<'a>> {
        std::iter::once(&self.first).chain(&self.second)
    }

    /// The Vars of all parts, in order.
    pub(super) fn vars(&self) -> Vec<Var> {
        let vars = self.iter().flat_map(|part| part.trained.vars().vars());
        vars.cloned().collect()
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VarRecord {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) dtype: String,
    /// Whether the Var has had a gradient. Before that it has no arrays.
    pub(super) has_stepped: bool,
    /// The Var's steps, if they differ from the optimizer's: it had no gradient in some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    steps: Option<u64>,
    /// Whether the second optimizer of a pair trains it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) is_second: bool,
}

impl VarRecord {
    /// A Var without state.
    pub(super) fn fresh(name: String, shape: Vec<usize>, dtype: &str) -> Self {
        Self {
            name,
            shape,
            dtype: dtype.to_string(),
            has_stepped: false,
            steps: None,
            is_second: false,
        }
    }

    /// The Var's steps, if the optimizer has taken `steps`.
    pub(super) fn count(&self, steps: u64) -> u64 {
        if self.has_stepped {
            self.steps.unwrap_or(steps)
        } else {
            0
        }
    }
}

/// The state of a [`ClippedOptimizer`](crate::ClippedOptimizer) around the optimizer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrapperRecord {
    #[serde(with = "crate::clip::record::clip")]
    pub(super) clip: Clip,
    /// The clip's history.
    #[serde(default, skip_serializing_if = "RuleRecord::is_empty")]
    pub(super) rule: RuleRecord,
    pub(super) step: u64,
    pub(super) steps_taken: u64,
    pub(super) skips_in_a_row: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) loss_scaler: Option<Scaling>,
    /// The state of a user-defined rule: an array in the file.
    #[serde(skip)]
    pub(super) own_rule: Vec<f64>,
}

impl WrapperRecord {
    /// The lists that are arrays in the file, by name, and not part of this JSON. No Var's array
    /// ends in these names.
    pub(super) fn lists(&mut self) -> Vec<(&'static str, &mut Vec<f64>)> {
        let mut lists = self.rule.lists();
        lists.push(("clip.own_rule", &mut self.own_rule));
        lists
    }

    /// Checks the rules' histories. For a loaded file this is complete only after its arrays are
    /// read.
    pub(super) fn check_histories(&self) -> Checked<()> {
        if let Some(reason) = self.rule.fault(&self.clip) {
            return Err(Fault::Invalid(reason));
        }
        match self.own_rule.iter().find(|x| !x.is_finite()) {
            Some(bad) => Err(Fault::Invalid(format!(
                "the ClipRule's state has {bad}, expected finite numbers"
            ))),
            None => Ok(()),
        }
    }
}

impl CheckpointHeader {
    /// A header of one optimizer, whose Vars have these names.
    pub(super) fn new(names: &[String], part: &Part<'_>, snapshot: &Snapshot<'_>) -> Self {
        let steps = snapshot.steps;
        let of = |((name, var), count): ((&String, &Var), u64)| VarRecord {
            has_stepped: count > 0,
            steps: Some(count).filter(|count| *count > 0 && *count != steps),
            ..VarRecord::fresh(name.clone(), var.dims().to_vec(), var.dtype().as_str())
        };
        let vars = names.iter().zip(part.trained.vars().vars());
        Self {
            optimizer: part.settings.clone(),
            steps,
            vars: vars.zip(snapshot.counts.iter().copied()).map(of).collect(),
            groups: part.groups.clone(),
            second: None,
            wrapper: None,
            non_finite: false,
        }
    }

    /// Adds the second optimizer of a pair.
    pub(super) fn add_second(&mut self, second: Self) {
        self.second = Some(OptimizerRecord {
            optimizer: second.optimizer,
            steps: second.steps,
            groups: second.groups,
        });
        self.vars
            .extend(second.vars.into_iter().map(|var| VarRecord {
                is_second: true,
                ..var
            }));
    }

    /// The optimizers' settings, steps and groups.
    pub(super) fn optimizers(&self) -> impl Iterator<Item = (&Settings, u64, &[String])> {
        let second = self.second.as_ref();
        let second = second.map(|second| (&second.optimizer, second.steps, &second.groups[..]));
        std::iter::once((&self.optimizer, self.steps, &self.groups[..])).chain(second)
    }

    /// The settings of the optimizer that trains this Var.
    pub(super) fn settings_of(&self, var: &VarRecord) -> &Settings {
        match &self.second {
            Some(second) if var.is_second => &second.optimizer,
            _ => &self.optimizer,
        }
    }

    /// The steps of the optimizer that trains this Var.
    pub(super) fn steps_of(&self, var: &VarRecord) -> u64 {
        match &self.second {
            Some(second) if var.is_second => second.steps,
            _ => self.steps,
        }
    }

    pub(super) fn to_json(&self) -> Checked<String> {
        serde_json::to_string(self).map_err(|error| Fault::Invalid(error.to_string()))
    }

    pub(super) fn from_metadata(metadata: &Metadata) -> Checked<Self> {
        let invalid = |reason: String| Err(Fault::Invalid(reason));
        match metadata.format.as_deref() {
            Some(FORMAT) => {}
            Some(other) => {
                return invalid(format!("its format is {other:?}, expected {FORMAT:?}"));
            }
            None => {
                return invalid(format!(
                    "a safetensors file, but not a checkpoint of an optimizer: its metadata has no \
                     format, expected {FORMAT:?} (weights are loaded by VarMap::load)"
                ));
            }
        }
        let version = metadata.format_version.as_deref().unwrap_or("missing");
        if version != VERSION {
            let writer = metadata.crate_version.as_deref().unwrap_or("unknown");
            return invalid(format!(
                "its format version is {version}, expected {VERSION}; it was written by \
                 candle-grad-clip {writer}: load it with that version"
            ));
        }
        let Some(json) = metadata.checkpoint.as_deref() else {
            return invalid("its metadata has no entry \"checkpoint\"".to_string());
        };
        let sum = hex(crc32fast::hash(json.as_bytes()));
        let expected = metadata.checkpoint_crc32.as_deref().unwrap_or("missing");
        if sum != expected {
            return invalid(format!(
                "its metadata is damaged: its checksum is {sum}, expected {expected}"
            ));
        }
        serde_json::from_str(json)
            .map_err(|error| Fault::Invalid(format!("its metadata can't be read: {error}")))
    }

    /// Checks what can be checked without an optimizer. Also used before saving, so that every
    /// saved file can be loaded.
    pub(super) fn check(&self, max_steps: u64) -> Checked<()> {
        self.check_settings()?;
        if let Some(wrapper) = &self.wrapper {
            wrapper.check_histories()?;
        }
        self.check_counters(max_steps)?;
        self.check_vars()
    }

    /// Checks that the settings are in their ranges.
    fn check_settings(&self) -> Checked<()> {
        let mut optimizers = self.optimizers();
        let in_range = optimizers.try_for_each(|(settings, ..)| settings.check());
        let in_range = in_range.and_then(|()| {
            let Some(wrapper) = &self.wrapper else {
                return Ok(());
            };
            wrapper.clip.check()?;
            let scaler = wrapper.loss_scaler.clone().map(LossScaler);
            scaler.map_or(Ok(()), |scaler| scaler.check())
        });
        in_range.map_err(|error| Fault::Invalid(error.to_string()))
    }

    fn check_counters(&self, max_steps: u64) -> Checked<()> {
        let check = |name: &str, steps: u64| {
            if steps > max_steps {
                return Err(Fault::Invalid(format!(
                    "{name} is {steps}, expected {max_steps} at most"
                )));
            }
            Ok(())
        };
        for (_, steps, _) in self.optimizers() {
            check("steps", steps)?;
        }
        let Some(wrapper) = &self.wrapper else {
            return Ok(());
        };
        check("step", wrapper.step)?;
        if wrapper.steps_taken > wrapper.step {
            return Err(Fault::Invalid(format!(
                "steps_taken is {}, expected {} at most, which is the wrapper's step",
                wrapper.steps_taken, wrapper.step
            )));
        }
        Ok(())
    }

    fn check_vars(&self) -> Checked<()> {
        let mut seen = HashSet::new();
        for var in &self.vars {
            let name = &var.name;
            if !seen.insert(name) {
                return Err(Fault::Invalid(format!(
                    "two Vars are named {name:?}, expected a name of its own for each: make the \
                     optimizer or the wrapper from a VarMap, or from (name, Var) pairs"
                )));
            }
            if var.is_second && self.second.is_none() {
                return Err(Fault::Invalid(format!(
                    "{name:?} is of a second optimizer, and there is but one"
                )));
            }
            let steps = self.steps_of(var);
            if var.has_stepped && steps == 0 {
                return Err(Fault::Invalid(format!(
                    "{name:?} has state, but no step was taken"
                )));
            }
            let most = if var.has_stepped { steps } else { 0 };
            if let Some(own) = var.steps.filter(|own| !(1..=most).contains(own)) {
                return Err(Fault::Invalid(format!(
                    "{name:?} has taken {own} steps, expected 1 to {most}, or none that are told"
                )));
            }
        }
        Ok(())
    }
}

/// The groups as text, for comparison.
pub(super) fn describe_groups(groups: &ParamGroups) -> Vec<String> {
    groups.iter().map(ToString::to_string).collect()
}
