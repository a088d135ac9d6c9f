//! Whether a checkpoint fits an optimizer.

use std::collections::{HashMap, HashSet};

use candle_core::Var;

use super::fault::{Checked, Fault, join_names};
use super::header::{CheckpointHeader, Parts, VarRecord};
use crate::optim::Settings;
use crate::vars::NamedVars;

/// The records of the optimizers' Vars, in their order, or an error with all differences.
pub(super) fn match_vars<'h>(
    header: &'h CheckpointHeader,
    parts: &Parts<'_>,
) -> Checked<Vec<&'h VarRecord>> {
    let there: Vec<&Settings> = header.optimizers().map(|(settings, ..)| settings).collect();
    let here: Vec<&Settings> = parts.iter().map(|part| &part.settings).collect();
    let mut differences = other_settings(&there, &here);
    let groups = header.optimizers().zip(parts.iter());
    differences
        .extend(groups.filter_map(|((_, _, there), part)| other_groups(there, &part.groups)));
    let Some(second) = &parts.second else {
        return match_records(&header.vars, parts.first.trained.vars(), differences);
    };
    let names = parts.iter().flat_map(|part| part.trained.vars().names());
    let vars: NamedVars = names.cloned().zip(parts.vars()).collect::<Vec<_>>().into();
    let first_len = parts.first.trained.vars().vars().len();
    if vars.vars().len() < first_len + second.trained.vars().vars().len() {
        differences.push("both optimizers of the pair train the same Var here".to_string());
    }
    let of_second = vars.names().iter().skip(first_len);
    let of_second: HashSet<&String> = of_second.collect();
    let moved = header.vars.iter().filter(|record| {
        vars.names().contains(&record.name) && record.is_second != of_second.contains(&record.name)
    });
    let moved = moved.map(|record| format!("{:?}", record.name));
    differences.extend(titled(
        "Vars of the pair's other optimizer in the file",
        moved,
    ));
    match_records(&header.vars, &vars, differences)
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

fn other_settings(there: &[&Settings], here: &[&Settings]) -> Vec<String> {
    let (kind_there, kind_here) = (kind(there), kind(here));
    if kind_there != kind_here {
        return vec![format!(
            "the optimizer is {kind_there} in the file, {kind_here} here"
        )];
    }
    let fixed = |all: &[&Settings]| -> Vec<(&'static str, String)> {
        all.iter().flat_map(|settings| settings.fixed()).collect()
    };
    let (there, here) = (fixed(there), fixed(here));
    let pairs = there.into_iter().zip(here);
    let differ = pairs.filter(|((_, there), (_, here))| there != here);
    differ
        .map(|((name, there), (_, here))| format!("{name} is {there} in the file, {here} here"))
        .collect()
}

/// `AdamW`, or `a Pair of Sgd and AdamW`.
fn kind(optimizers: &[&Settings]) -> String {
    let kinds: Vec<&str> = optimizers.iter().map(|settings| settings.kind()).collect();
    match kinds[..] {
        [one] => one.to_string(),
        _ => format!("a Pair of {}", kinds.join(" and ")),
    }
}

fn other_groups(there: &[String], here: &[String]) -> Option<String> {
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
