//! What was run?

use serde_json::Value;

use super::heading;
use crate::history::History;
use crate::number::{number, time};
use crate::page::{Section, Table};
use crate::run_info::RunInfo;

pub(super) fn sections(info: &RunInfo, history: &History, seconds: f64) -> Vec<Section> {
    let mut rows: Vec<(String, String)> = Vec::new();
    let mut add = |name: &str, value: String| rows.push((name.to_owned(), value));
    if let Some(optimizer) = &info.optimizer {
        add("clip", optimizer.clip.clone());
        if let Some(rate) = optimizer.learning_rate {
            add("learning rate", format!("{rate}"));
        }
        add("device", optimizer.device.clone());
        let of_var = |var: &crate::run_info::VarInfo| var.shape.iter().product::<usize>();
        let elements: usize = optimizer.vars.iter().map(of_var).sum();
        let vars = optimizer.vars.len();
        add("Vars", format!("{vars}, {elements} elements"));
    }
    add("steps", history.steps.to_string());
    add("time", time(seconds));
    if seconds > 0.0 && history.steps > 0 {
        add("steps a second", number(history.steps as f64 / seconds));
    }
    if info.starts.len() > 1 {
        let steps = info.starts.iter().map(|start| start.after_step.to_string());
        let steps: Vec<_> = steps.skip(1).collect();
        add("resumed after step", steps.join(", "));
    }
    add("candle-grad-clip", info.version.clone());
    add("system", info.system.clone());
    flatten("", &info.config, &mut rows);
    let rows = rows.into_iter().map(|(name, value)| vec![name, value]);
    vec![
        heading("What was run?"),
        Section::Table(Table {
            title: String::new(),
            columns: vec!["what".into(), "value".into()],
            rows: rows.collect(),
        }),
    ]
}

/// A row for each value of the config; a list of plain values is one.
fn flatten(name: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Null if name.is_empty() => {}
        Value::Object(fields) => {
            for (field, value) in fields {
                let dot = if name.is_empty() { "" } else { "." };
                flatten(&format!("{name}{dot}{field}"), value, rows);
            }
        }
        Value::String(text) => rows.push((name.to_owned(), text.clone())),
        other => rows.push((name.to_owned(), other.to_string())),
    }
}
