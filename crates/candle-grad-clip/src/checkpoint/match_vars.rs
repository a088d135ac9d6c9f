//! Whether a checkpoint fits an optimizer.

use std::collections::{HashMap, HashSet};

use candle_core::Var;

use super::fault::{Checked, Fault, join_names};
use super::header::{CheckpointHeader, VarRecord, describe_groups};
use crate::groups::ParamGroups;
use crate::optim::{ParamStates, Settings};
use crate::vars::NamedVars;

/// The records of the optimizer's Vars, in its order, or an error with all differences.
pub(super) fn match_vars<'h>(
    header: &'h CheckpointHeader,
    trained: &ParamStates,
    settings: &Settings,
) -> Checked<Vec<&'h VarRecord>> {
    let mut differences = other_settings(&header.optimizer, settings);
    differences.extend(other_groups(&header.groups, trained.groups()));
    match_records(&header.vars, trained.vars(), differences)
}

/// The records of these Vars, in their order, or an error with all differences, after those that
/// are known.
pub(super) fn match_records<'h>(
    records: &'h [VarRecord],
    vars: &NamedVars,
    mut differences: Vec<String>,
) -> Checked<Vec<&'h VarRecord>> {
    let by_name: HashMap<&str, &VarRecord> = records
        .iter()
        .map(|record| (record.name.as_str(), record))
        .collect();
    let ours = vars.names().iter().zip(vars.vars());
    let matched: Vec<(&Var, &VarRecord)> = ours
        .filter_map(|(name, var)| Some((var, *by_name.get(name.as_str())?)))
        .collect();
    differences.extend(other_names(records, vars, &by_name));
    differences.extend(other_shapes_and_dtypes(&matched));
    let names: HashSet<&String> = vars.names().iter().collect();
    if names.len() < vars.names().len() {
        differences.push("two Vars here have the same name".to_string());
    }
    if differences.is_empty() {
        return Ok(matched.into_iter().map(|(_, record)| record).collect());
    }
    Err(Fault::Different(differences))
}

fn other_settings(there: &Settings, here: &Settings) -> Vec<String> {
    if there.kind() != here.kind() {
        let (there, here) = (there.kind(), here.kind());
        return vec![format!("the optimizer is {there} in the file, {here} here")];
    }
    let pairs = there.fixed().into_iter().zip(here.fixed());
    let differ = pairs.filter(|((_, there), (_, here))| there != here);
    differ
        .map(|((name, there), (_, here))| format!("{name} is {there} in the file, {here} here"))
        .collect()
}

fn other_groups(there: &[String], here: &ParamGroups) -> Option<String> {
    let here = describe_groups(here);
    (there != here).then(|| {
        let (there, here) = (there.join("; "), here.join("; "));
        format!("groups are [{there}] in the file, [{here}] here")
    })
}

/// Vars that are only here or only in the file.
fn other_names(
    records: &[VarRecord],
    vars: &NamedVars,
    by_name: &HashMap<&str, &VarRecord>,
) -> Vec<String> {
    let ours: HashSet<&String> = vars.names().iter().collect();
    let there = records.iter().map(|record| &record.name);
    let missing = vars.names().iter();
    let missing = missing.filter(|name| !by_name.contains_key(name.as_str()));
    let unexpected = there.filter(|name| !ours.contains(name));
    let quoted = |name: &String| format!("{name:?}");
    [
        titled("Vars that are not in the file", missing.map(quoted)),
        titled("Vars that are only in the file", unexpected.map(quoted)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn other_shapes_and_dtypes(matched: &[(&Var, &VarRecord)]) -> Vec<String> {
    let shapes = matched.iter().filter_map(|(var, record)| {
        let VarRecord { name, shape, .. } = record;
        let here = var.dims();
        (shape != here).then(|| format!("{name:?} is {shape:?} in the file, {here:?} here"))
    });
    let dtypes = matched.iter().filter_map(|(var, record)| {
        let VarRecord { name, dtype, .. } = record;
        let here = var.dtype().as_str();
        (dtype != here).then(|| format!("{name:?} is {dtype} in the file, {here} here"))
    });
    [
        titled("other shapes", shapes),
        titled("other dtypes", dtypes),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn titled(title: &str, items: impl Iterator<Item = String>) -> Option<String> {
    let items: Vec<String> = items.collect();
    (!items.is_empty()).then(|| format!("{title}: {}", join_names(&items)))
}
