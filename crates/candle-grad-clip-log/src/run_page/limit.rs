//! Which limit would suit?

use candle_grad_clip::MaxNormSuggestion;

use super::{heading, text};
use crate::history::History;
use crate::number::{number, percent};
use crate::page::{Mark, Section, Table};
use crate::run_info::RunInfo;

pub(super) fn sections(info: &RunInfo, history: &History) -> Vec<Section> {
    let mut sections = vec![heading("Which limit would suit?")];
    let suggestions = history.norms.suggest_max_norm();
    if suggestions.is_empty() {
        let none = "No step had a finite norm above 0.";
        sections.push(text(none, Mark::None));
        return sections;
    }
    let now = info.optimizer.as_ref().map_or_else(String::new, |opt| {
        format!(" The clip of this run is {}.", opt.clip)
    });
    let sentence = format!(
        "A limit of max_norm clips the steps whose norm is above it.{now} Percentiles of a run \
         without clipping, at a safe learning rate, are the best guide."
    );
    sections.push(text(sentence, Mark::None));
    let row = |suggestion: MaxNormSuggestion| {
        vec![
            format!("{}", suggestion.percentile),
            number(suggestion.max_norm),
            percent(suggestion.clipped_fraction),
        ]
    };
    let columns = ["percentile", "max_norm", "steps that it would clip"];
    sections.push(Section::Table(Table {
        title: "Percentiles of the norm before clipping".into(),
        columns: columns.map(str::to_owned).to_vec(),
        rows: suggestions.into_iter().map(row).collect(),
    }));
    sections
}
