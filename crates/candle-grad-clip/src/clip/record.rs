//! How checkpoints store a [`Clip`] (as text) and the histories of its rules (numbers, by method).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::config::Clip;
use super::methods::AnyMethod;
use super::rule::{Rule, Saved};

/// For `#[serde(with)]`. Independent of the feature `serde`, as checkpoints are always available.
pub(crate) mod clip {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Clip;

    pub(crate) fn serialize<S: Serializer>(clip: &Clip, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(clip)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Clip, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The histories of a clip's rules. The lists are arrays in the file, not part of this JSON.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RuleRecord {
    /// By the method's name.
    #[serde(skip)]
    lists: BTreeMap<&'static str, Vec<f64>>,
    /// By the method's name and the Var's.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    of_vars: BTreeMap<String, BTreeMap<String, Vec<f64>>>,
}

impl RuleRecord {
    /// The histories of a clip's rules, for Vars with these names.
    pub(super) fn new(clip: &Clip, rules: &[Box<dyn Rule>], names: &[String]) -> Self {
        let mut record = Self::default();
        for (part, rule) in clip.parts.iter().zip(rules) {
            let (name, saved) = (part.method.name(), rule.save());
            let of_vars = names.iter().cloned().zip(saved.of_vars);
            let of_vars: BTreeMap<String, Vec<f64>> =
                of_vars.filter(|(_, numbers)| !numbers.is_empty()).collect();
            if !of_vars.is_empty() {
                record.of_vars.insert(name.to_string(), of_vars);
            }
            record.lists.insert(name, saved.numbers);
        }
        record
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.of_vars.is_empty() && self.lists.values().all(Vec::is_empty)
    }

    /// All possible lists, with the names of their arrays in the file.
    pub(crate) fn lists(&mut self) -> Vec<(&'static str, &mut Vec<f64>)> {
        for (name, _) in AnyMethod::ARRAYS {
            self.lists.entry(name).or_default();
        }
        let array = |name| AnyMethod::ARRAYS.iter().find(|(method, _)| *method == name);
        let lists = self.lists.iter_mut();
        lists
            .filter_map(|(name, list)| Some((array(*name)?.1, list)))
            .collect()
    }

    /// Vars that have numbers here but are not among `names`.
    pub(super) fn unknown(&self, names: &[String]) -> Vec<String> {
        let known: BTreeSet<&String> = names.iter().collect();
        let vars = self.of_vars.values().flat_map(BTreeMap::keys);
        vars.filter(|name| !known.contains(name)).cloned().collect()
    }

    /// The reason why this record cannot be of this clip, if there is one.
    pub(crate) fn fault(&self, clip: &Clip) -> Option<String> {
        if self.lists.is_empty() {
            return None; // the file's arrays are not read yet
        }
        let lists = self.lists.iter().filter(|(_, list)| !list.is_empty());
        let names = lists.map(|(name, _)| *name);
        let mut names = names.chain(self.of_vars.keys().map(String::as_str));
        let is_there = |name: &str| clip.parts.iter().any(|part| part.method.name() == name);
        if let Some(name) = names.find(|name| !is_there(name)) {
            return Some(format!(
                "it has a history of {name}, but the clip is {clip}"
            ));
        }
        let vars: BTreeSet<&String> = self.of_vars.values().flat_map(BTreeMap::keys).collect();
        let vars: Vec<String> = vars.into_iter().cloned().collect();
        self.start(clip, &vars).err()
    }

    /// The clip's rules, resumed from this record, for Vars with these names.
    pub(super) fn start(
        &self,
        clip: &Clip,
        names: &[String],
    ) -> Result<Vec<Box<dyn Rule>>, String> {
        let mut rules = Vec::with_capacity(clip.parts.len());
        for part in &clip.parts {
            let mut rule = part.method.config().start();
            let saved = self.saved(part.method.name(), names);
            if !saved.is_empty() {
                rule.load(&saved)?;
            }
            rules.push(rule);
        }
        Ok(rules)
    }

    fn saved(&self, name: &str, names: &[String]) -> Saved {
        let of_vars = self.of_vars.get(name).map(|of_vars| {
            let numbers = |name| of_vars.get(name).cloned().unwrap_or_default();
            names.iter().map(numbers).collect()
        });
        Saved {
            numbers: self.lists.get(name).cloned().unwrap_or_default(),
            of_vars: of_vars.unwrap_or_default(),
        }
    }
}
