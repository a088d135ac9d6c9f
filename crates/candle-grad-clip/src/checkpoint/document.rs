//! What a checkpoint says of itself: JSON in the metadata of the safetensors file.

use std::collections::{HashMap, HashSet};

use candle_core::Var;
use serde::{Deserialize, Serialize};

use super::file::Metadata;
use super::settings::Settings;
use super::{Checked, Fault, listed};
use crate::Clip;
use crate::clip::record::RuleRecord;
use crate::groups::ParamGroups;
use crate::loss_scaler::{LossScaler, Scaling};
use crate::optim::trained::{Snapshot, Trained};

/// What the files are.
pub(super) const FORMAT: &str = "candle-grad-clip optimizer";
/// A reader that does not know a version refuses it. Any new field is a new version.
pub(super) const VERSION: &str = "1";

/// No training takes more steps; a counter must not overflow.
pub(super) const MAX_STEPS: u64 = 1 << 53;
/// Of a file that is loaded: from there as many steps can be taken and saved again.
pub(super) const MAX_STEPS_LOADED: u64 = MAX_STEPS / 2;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    pub(super) optimizer: Settings,
    /// Steps taken.
    pub(super) steps: u64,
    pub(super) vars: Vec<VarRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    groups: Vec<String>,
    /// There if a wrapper saved the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) wrapper: Option<WrapperRecord>,
    /// Whether the state was saved although it may be NaN or infinite.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) non_finite: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VarRecord {
    pub(super) name: String,
    shape: Vec<usize>,
    dtype: String,
    /// Whether it has had a gradient: before that it has no arrays.
    pub(super) has_stepped: bool,
    /// The steps that it has taken, if that is another number than the optimizer's: it had no gradient in some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    steps: Option<u64>,
}

impl VarRecord {
    /// The steps that the Var has taken, of an optimizer that has taken `steps`.
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
pub(crate) struct WrapperRecord {
    #[serde(with = "crate::clip::record::clip")]
    pub(crate) clip: Clip,
    /// What the clip remembers of the steps before.
    #[serde(default, skip_serializing_if = "RuleRecord::is_empty")]
    pub(crate) rule: RuleRecord,
    pub(crate) step: u64,
    /// Not in files of before it was counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) steps_taken: Option<u64>,
    pub(crate) skips_in_a_row: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) loss_scaler: Option<Scaling>,
    /// What a rule of the user's saved: an array in the file.
    #[serde(skip)]
    pub(crate) own_rule: Vec<f64>,
}

impl WrapperRecord {
    /// What grows with the steps: arrays in the file, by name, and not in the document. Of each name the last part is no array of a Var.
    pub(super) fn lists(&mut self) -> Vec<(&'static str, &mut Vec<f64>)> {
        let mut lists = self.rule.lists();
        lists.push(("clip.own_rule", &mut self.own_rule));
        lists
    }

    /// Checks what the rules remember; of a file once its arrays are read.
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

impl Document {
    pub(super) fn new(
        names: &[String],
        trained: &Trained,
        snapshot: &Snapshot<'_>,
        optimizer: Settings,
        wrapper: Option<WrapperRecord>,
    ) -> Self {
        let steps = snapshot.steps;
        let of = |((name, var), count): ((&String, &Var), u64)| VarRecord {
            name: name.clone(),
            shape: var.dims().to_vec(),
            dtype: var.dtype().as_str().to_string(),
            has_stepped: count > 0,
            steps: Some(count).filter(|count| *count > 0 && *count != steps),
        };
        let vars = names.iter().zip(trained.vars().vars());
        Self {
            optimizer,
            steps,
            vars: vars.zip(snapshot.counts.iter().copied()).map(of).collect(),
            groups: written(trained.groups()),
            wrapper,
            non_finite: false,
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
        let sum = super::file::hex(crc32fast::hash(json.as_bytes()));
        let expected = metadata.checkpoint_crc32.as_deref().unwrap_or("missing");
        if sum != expected {
            return invalid(format!(
                "its metadata is damaged: its checksum is {sum}, expected {expected}"
            ));
        }
        serde_json::from_str(json)
            .map_err(|error| Fault::Invalid(format!("its metadata can't be read: {error}")))
    }

    /// Checks what can be checked without an optimizer. Also before saving, so that no file is written that can't be loaded.
    pub(super) fn check(&self, max_steps: u64) -> Checked<()> {
        let invalid = |reason: String| Err(Fault::Invalid(reason));
        let in_range = self.optimizer.check().and_then(|()| {
            let Some(wrapper) = &self.wrapper else {
                return Ok(());
            };
            wrapper.clip.check()?;
            let scaler = wrapper.loss_scaler.clone().map(LossScaler);
            scaler.map_or(Ok(()), |scaler| scaler.check())
        });
        if let Err(error) = in_range {
            return invalid(error.to_string());
        }
        let wrapper = self.wrapper.as_ref();
        wrapper.map_or(Ok(()), WrapperRecord::check_histories)?;
        let of_wrapper = |count: fn(&WrapperRecord) -> u64| wrapper.map_or(0, count);
        for (name, steps) in [
            ("steps", self.steps),
            ("step", of_wrapper(|wrapper| wrapper.step)),
        ] {
            if steps > max_steps {
                return invalid(format!("{name} is {steps}, expected {max_steps} at most"));
            }
        }
        let wrapper_step = of_wrapper(|wrapper| wrapper.step);
        let steps_taken = wrapper.and_then(|wrapper| wrapper.steps_taken);
        if let Some(taken) = steps_taken.filter(|taken| *taken > wrapper_step) {
            return invalid(format!(
                "steps_taken is {taken}, expected {wrapper_step} at most, which is the wrapper's step"
            ));
        }
        let mut seen = HashSet::new();
        for VarRecord {
            name,
            has_stepped,
            steps,
            ..
        } in &self.vars
        {
            if !seen.insert(name) {
                return invalid(format!(
                    "two Vars are named {name:?}, expected a name of its own for each: make the \
                     optimizer or the wrapper from a VarMap, or from (name, Var) pairs"
                ));
            }
            if *has_stepped && self.steps == 0 {
                return invalid(format!("{name:?} has state, but no step was taken"));
            }
            let most = if *has_stepped { self.steps } else { 0 };
            if let Some(own) = steps.filter(|own| !(1..=most).contains(own)) {
                return invalid(format!(
                    "{name:?} has taken {own} steps, expected 1 to {most}, or none that are told"
                ));
            }
        }
        Ok(())
    }

    /// The records of the optimizer's Vars, in its order, or in what the file is of another optimizer.
    pub(super) fn fit(&self, trained: &Trained, settings: &Settings) -> Checked<Vec<&VarRecord>> {
        let mut differences = self.other_settings(settings);
        let (there, here) = (&self.groups, written(trained.groups()));
        if *there != here {
            let there = there.join("; ");
            let here = here.join("; ");
            differences.push(format!("groups are [{there}] in the file, [{here}] here"));
        }
        let vars = trained.vars();
        let by_name: HashMap<&str, &VarRecord> = self
            .vars
            .iter()
            .map(|record| (record.name.as_str(), record))
            .collect();
        let ours: HashSet<&str> = vars.names().iter().map(String::as_str).collect();
        let (mut missing, mut shapes, mut dtypes) = (Vec::new(), Vec::new(), Vec::new());
        let mut records = Vec::with_capacity(vars.names().len());
        for (name, var) in vars.names().iter().zip(vars.vars()) {
            let Some(record) = by_name.get(name.as_str()).copied() else {
                missing.push(format!("{name:?}"));
                continue;
            };
            records.push(record);
            let (shape, dtype) = (var.dims(), var.dtype().as_str());
            if record.shape != shape {
                let there = &record.shape;
                shapes.push(format!("{name:?} is {there:?} in the file, {shape:?} here"));
            }
            if record.dtype != dtype {
                let there = &record.dtype;
                dtypes.push(format!("{name:?} is {there} in the file, {dtype} here"));
            }
        }
        let unexpected = self.vars.iter().map(|record| &record.name);
        let unexpected = unexpected.filter(|name| !ours.contains(name.as_str()));
        let unexpected = unexpected.map(|name| format!("{name:?}")).collect();
        for (title, names) in [
            ("Vars that are not in the file", missing),
            ("Vars that are only in the file", unexpected),
            ("other shapes", shapes),
            ("other dtypes", dtypes),
        ] {
            if !names.is_empty() {
                differences.push(format!("{title}: {}", listed(&names)));
            }
        }
        if ours.len() < vars.names().len() {
            differences.push("two Vars here have the same name".to_string());
        }
        if differences.is_empty() {
            return Ok(records);
        }
        Err(Fault::Different(differences))
    }

    fn other_settings(&self, here: &Settings) -> Vec<String> {
        if self.optimizer.kind() != here.kind() {
            let (there, here) = (self.optimizer.kind(), here.kind());
            return vec![format!("the optimizer is {there} in the file, {here} here")];
        }
        let pairs = self.optimizer.fixed().into_iter().zip(here.fixed());
        let differ = pairs.filter(|((_, there), (_, here))| there != here);
        differ
            .map(|((name, there), (_, here))| format!("{name} is {there} in the file, {here} here"))
            .collect()
    }
}

/// Groups as they are compared.
fn written(groups: &ParamGroups) -> Vec<String> {
    groups.iter().map(ToString::to_string).collect()
}
