//! Is it learning?

use super::{heading, line, text};
use crate::history::{History, LossHistory};
use crate::number::number;
use crate::page::{Curve, LineChart, Mark, Panel, Section, spans_decades};

/// The name without its prefix, if it is that of a loss.
pub(super) fn is_loss(name: &str) -> Option<&str> {
    name.strip_prefix("loss/")
}

pub(super) fn sections(history: &History) -> Vec<Section> {
    let mut sections = vec![heading("Is it learning?")];
    let mut lines = Vec::new();
    if !history.loss.curve.is_empty() {
        lines.push(line("train", &history.loss.curve, 0));
        sections.push(train_text(&history.loss));
    }
    let others = history.scalars.iter();
    for (name, curve) in others.filter_map(|(name, curve)| Some((is_loss(name)?, curve))) {
        lines.push(line(name, curve, lines.len()));
        sections.push(other_text(name, curve));
    }
    if lines.is_empty() {
        let none = "No loss was logged. Give it to step(&report, loss), and others to \
                    scalar(\"loss/test\", step, value).";
        sections.push(text(none, Mark::None));
        return sections;
    }
    let chart = LineChart {
        x_label: "step".into(),
        panels: vec![Panel {
            y_label: "loss".into(),
            y_log: spans_decades(&lines),
            lines,
            ..Panel::default()
        }],
        ..LineChart::default()
    };
    sections.push(Section::LineChart(chart));
    sections
}

fn train_text(loss: &LossHistory) -> Section {
    let last = loss.curve.last().map_or(f64::NAN, |(_, loss)| loss);
    if !last.is_finite() {
        let now = format!(
            "The training loss is {} now. A non-finite loss trains nothing: lower the learning \
             rate, or look for the first bad step below.",
            number(last)
        );
        return text(now, Mark::Warning);
    }
    let lowest = loss.lowest.map_or_else(String::new, |(step, loss)| {
        format!("; the lowest was {} at step {step}", number(loss))
    });
    let now = format!("The training loss is {} now{lowest}.", number(last));
    let Some((first, recent)) = loss.first_and_last_mean() else {
        return text(now, Mark::None);
    };
    let (means, mark) = if recent < first {
        ("has fallen", Mark::Good)
    } else if recent.is_finite() && first.is_finite() {
        ("has not fallen", Mark::Warning)
    } else {
        ("was NaN or infinite in between", Mark::Warning)
    };
    let (first, recent) = (number(first), number(recent));
    let means = format!(
        "It {means}: the mean of the first steps was {first}, that of the last ones is {recent}."
    );
    text(format!("{means} {now}"), mark)
}

fn other_text(name: &str, curve: &Curve) -> Section {
    let points = curve.points();
    let finite = points.iter().filter(|point| point.1.is_finite());
    let lowest = finite.min_by(|a, b| a.1.total_cmp(&b.1));
    let (Some((_, last)), Some((step, lowest))) = (curve.last(), lowest) else {
        return text(format!("The {name} loss was never finite."), Mark::Warning);
    };
    let (last, lowest) = (number(last), number(*lowest));
    let sentence =
        format!("The {name} loss is {last} now; the lowest was {lowest} at step {step}.");
    text(sentence, Mark::None)
}
