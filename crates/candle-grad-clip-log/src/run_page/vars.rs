//! Which Vars learn nothing, and which dominate the norm?

use super::{heading, listed, text};
use crate::history::History;
use crate::number::{count, number, percent};
use crate::page::{HeatMap, Mark, Section, Table};
use crate::param_norms::{Bin, VarSummary};
use crate::run_info::RunInfo;

/// A gradient that was exactly zero for so many steps is reported.
const ZERO_STEPS: u64 = 100;

/// The most rows of the heat map and of the table: a page is to open quickly with 10,000 Vars.
const MOST_ROWS: usize = 50;

/// How many names a sentence has.
const MOST_NAMES: usize = 20;

const HOW_TO_GET_NORMS: &str =
    "Norms by Var were not measured: add `.with_param_norms(true)` to the ClippedOptimizer.";

/// Which Vars learn nothing?
pub(super) fn missing(info: &RunInfo, history: &History) -> Vec<Section> {
    let mut sections = vec![heading("Which Vars learn nothing?")];
    let missing = &history.missing;
    let non_finite = history.norms.non_finite();
    if non_finite > 0 {
        let sentence = format!(
            "{} of {} had NaN or infinite gradients, which train no Var.",
            non_finite,
            count(history.steps, "step")
        );
        sections.push(text(sentence, Mark::Warning));
    }
    if missing.counts.is_empty() && missing.steps > 0 {
        let all = "Every Var had a gradient in every step.";
        sections.push(text(all, good(history)));
    }
    if !missing.counts.is_empty() {
        sections.extend(missing_sections(info, history));
    }
    sections.push(zeros(history));
    sections
}

fn missing_sections(info: &RunInfo, history: &History) -> Vec<Section> {
    let missing = &history.missing;
    let is_always = |count: &u64| *count == missing.steps;
    let always: Vec<&str> = missing
        .counts
        .iter()
        .filter_map(|(name, count)| is_always(count).then_some(name.as_str()))
        .collect();
    let mut sections = Vec::new();
    if !always.is_empty() {
        let advice = format!(
            "No gradient in any step, so not trained: {}.\n\
             Operations without a backward pass cut the graph, and candle does not report it: \
             LayerNorm::forward, RmsNorm::forward, softmax_last_dim and rope of candle-nn. Use \
             ops::layer_norm_slow, RmsNorm::forward_diff, ops::softmax and rope_slow. Name Vars \
             that are meant to get none by ignore_missing_grads.",
            listed(&always, MOST_NAMES)
        );
        sections.push(text(advice, Mark::Warning));
    }
    let row = |(name, count): (&String, &u64)| {
        let steps = format!("{count} of {}", missing.steps);
        vec![name.clone(), shape(info, name), steps]
    };
    let columns = ["Var", "shape", "steps without a gradient"];
    sections.push(Section::Table(Table {
        title: "Vars without a gradient, in the steps since the last start".into(),
        columns: columns.map(str::to_owned).to_vec(),
        rows: missing.counts.iter().map(row).collect(),
    }));
    sections
}

/// A gradient that is NaN is there and is not zero, but nothing is well.
fn good(history: &History) -> Mark {
    if history.norms.non_finite() == 0 {
        Mark::Good
    } else {
        Mark::None
    }
}

/// A gradient may be there and be zero: a unit that is never active, a mask, a factor of 0.
fn zeros(history: &History) -> Section {
    if history.param_norms.is_empty() {
        let unknown = format!(
            "Whether the gradient of a Var is always exactly zero is not known. {HOW_TO_GET_NORMS}"
        );
        return text(unknown, Mark::None);
    }
    let summaries = history.param_norms.summaries();
    let steps = history.param_norms.steps().min(ZERO_STEPS);
    let zeros = summaries.iter().filter(|var| var.zeros_in_a_row >= steps);
    let mut zeros: Vec<&str> = zeros.map(|var| var.name).collect();
    if zeros.is_empty() {
        let none = format!("No Var's gradient was exactly zero in all of the last {steps} steps.");
        return text(none, good(history));
    }
    zeros.sort_unstable();
    let advice = format!(
        "The gradient was there, but exactly zero in all of the last {steps} steps: \
         {}.\nUsual causes are ReLU units that are never active, a mask or a factor of 0, and \
         inputs that are always 0.",
        listed(&zeros, MOST_NAMES)
    );
    text(advice, Mark::Warning)
}

/// Which Vars dominate the norm?
pub(super) fn shares(info: &RunInfo, history: &History) -> Vec<Section> {
    let mut sections = vec![heading("Which Vars dominate the norm?")];
    let norms = &history.param_norms;
    if norms.is_empty() {
        sections.push(text(HOW_TO_GET_NORMS, Mark::None));
        return sections;
    }
    let summaries = norms.summaries();
    let shown = &summaries[..summaries.len().min(MOST_ROWS)];
    if let [first, .., _] = &summaries[..]
        && first.share > 0.0
    {
        let sentence = format!(
            "{} has {} of the squared norm of all gradients.",
            first.name,
            percent(first.share)
        );
        sections.push(text(sentence, Mark::None));
    }
    let row = |var: &VarSummary<'_>| {
        vec![
            var.name.to_owned(),
            shape(info, var.name),
            percent(var.share),
            var.median.map_or_else(String::new, number),
            number(var.largest),
        ]
    };
    let of_all = if shown.len() < summaries.len() {
        format!(", the first {} of {} Vars", shown.len(), summaries.len())
    } else {
        String::new()
    };
    let columns = [
        "Var",
        "shape",
        "share of the squared norm",
        "median norm",
        "largest finite norm",
    ];
    sections.push(Section::Table(Table {
        title: format!("Norms of the gradients before clipping{of_all}"),
        columns: columns.map(str::to_owned).to_vec(),
        rows: shown.iter().map(row).collect(),
    }));
    sections.push(Section::HeatMap(heat_map(history, shown, &of_all)));
    sections
}

fn heat_map(history: &History, shown: &[VarSummary<'_>], of_all: &str) -> HeatMap {
    let bins = history.param_norms.bins();
    let label = |bin: &Bin| {
        if bin.first_step == bin.last_step {
            bin.first_step.to_string()
        } else {
            format!("{}–{}", bin.first_step, bin.last_step)
        }
    };
    let row = |var: &VarSummary<'_>| {
        let cells = bins.iter().map(|bin| bin.rms(var.index));
        (var.name.to_owned(), cells.collect())
    };
    let width = history.param_norms.width();
    HeatMap {
        title: format!("Norm of each Var's gradient before clipping{of_all}"),
        x_label: "step".into(),
        value_label: if width == 1 {
            "norm".into()
        } else {
            format!("root mean square of the norms of {width} steps")
        },
        columns: bins.iter().map(label).collect(),
        rows: shown.iter().map(row).collect(),
    }
}

/// Empty if the optimizer was not described.
fn shape(info: &RunInfo, name: &str) -> String {
    let vars = info.optimizer.iter().flat_map(|optimizer| &optimizer.vars);
    let var = vars.into_iter().find(|var| var.name == name);
    var.map_or_else(String::new, |var| format!("{:?}", var.shape))
}
