//! Is it stable?

use super::{heading, line, text};
use crate::history::{History, WINDOW, reason};
use crate::number::{count, number, percent};
use crate::page::{LineChart, Mark, Panel, Section, Table};
use crate::rows::MetricsRow;

pub(super) fn sections(history: &History) -> Vec<Section> {
    let mut sections = vec![heading("Is it stable?")];
    if history.steps == 0 {
        sections.push(text("No step was logged yet.", Mark::None));
        return sections;
    }
    sections.push(clipped_text(history));
    sections.push(skipped_text(history));
    sections.push(Section::LineChart(chart(history)));
    if !history.skips.last.is_empty() {
        sections.push(Section::Table(skips(history)));
    }
    sections
}

fn clipped_text(history: &History) -> Section {
    let share = history.norms.clipped_fraction();
    let recent = history.recent_clipped_share();
    let window = history.steps.min(WINDOW as u64);
    let clipped = format!(
        "Clipping changed {} of all steps, and {} of the last {window}.",
        percent(share),
        percent(recent)
    );
    if recent > 0.9 && window > 1 {
        let advice = "A limit that clips nearly every step gives all of them the same length, so \
                      it only rescales the learning rate.";
        return text(format!("{clipped} {advice}"), Mark::Warning);
    }
    text(clipped, Mark::None)
}

fn skipped_text(history: &History) -> Section {
    let (skipped, non_finite) = (history.norms.skipped(), history.norms.non_finite());
    if skipped == 0 && non_finite == 0 {
        let good = "No step was skipped, and all gradients were finite.";
        return text(good, Mark::Good);
    }
    let mut parts = Vec::new();
    if skipped > 0 {
        let share = percent(skipped as f64 / history.steps as f64);
        let counts = history.skips.counts.iter();
        let counts = counts.map(|(reason, count)| format!("{count} because {reason}"));
        let counts: Vec<_> = counts.collect();
        let steps = count(skipped, "step");
        let counts = counts.join(", ");
        let were = if skipped == 1 { "was" } else { "were" };
        parts.push(format!("{steps} ({share}) {were} skipped: {counts}."));
    }
    if non_finite > 0 {
        let steps = count(non_finite, "step");
        parts.push(format!("{steps} had a norm that is NaN or infinite."));
    }
    text(parts.join(" "), Mark::Warning)
}

fn chart(history: &History) -> LineChart {
    let before = line("norm before clipping", &history.total_norm, 0);
    let after = line("norm after clipping", &history.clipped_norm, 1);
    let mut norms = vec![before, after];
    let mut levels = Vec::new();
    if !history.limit.is_empty() {
        let mut limit = line("limit", &history.limit, 2);
        let first = limit.points[0].1;
        if limit.points.iter().all(|point| point.1 == first) {
            levels.push((format!("limit {first}"), first));
        } else {
            (limit.dashed, limit.markers) = (true, false);
            norms.push(limit);
        }
    }
    let share = format!("clipped, of {WINDOW} steps");
    LineChart {
        x_label: "step".into(),
        panels: vec![
            Panel {
                y_label: "norm of all gradients".into(),
                y_log: true,
                lines: norms,
                levels,
                ..Panel::default()
            },
            Panel {
                y_label: "coefficient".into(),
                y_log: true,
                lines: vec![line("clip coefficient", &history.clip_coef, 3)],
                ..Panel::default()
            },
            Panel {
                y_label: share,
                lines: vec![line("share of clipped steps", &history.clipped_share, 4)],
                // The axis reaches from none to all.
                levels: vec![("all".into(), 1.0), ("none".into(), 0.0)],
                ..Panel::default()
            },
        ],
        ..LineChart::default()
    }
}

fn skips(history: &History) -> Table {
    let last = &history.skips.last;
    let row = |row: &MetricsRow| {
        vec![
            row.step.to_string(),
            reason(row).to_owned(),
            number(row.total_norm),
            row.loss.map_or_else(String::new, number),
            row.non_finite.to_string(),
        ]
    };
    let head = ["step", "reason", "norm", "loss", "non-finite elements"];
    let title = if history.norms.skipped() > last.len() as u64 {
        format!("The last {} skipped steps", last.len())
    } else {
        "Skipped steps".into()
    };
    Table {
        title,
        columns: head.map(str::to_owned).to_vec(),
        rows: last.iter().map(row).collect(),
    }
}
