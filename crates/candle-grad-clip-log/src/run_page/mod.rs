//! The page of one run: questions, and what its steps say to each.

mod about;
mod limit;
mod loss;
mod stability;
mod vars;

use crate::history::History;
use crate::number::{count, time};
use crate::page::{Curve, Line, LineChart, Mark, Page, Panel, Refresh, Section};
use crate::run_info::{RunInfo, State};

/// How often an open page looks for a newer one.
const RELOAD_SECONDS: f64 = 10.0;

/// The page of a run, after so many seconds.
pub(crate) fn page(name: &str, info: &RunInfo, history: &History, seconds: f64) -> Page {
    let mut sections = Vec::new();
    if let Some(reason) = &info.stopped_by {
        let sentence = format!("The run was stopped by this: {reason}");
        sections.push(text(sentence, Mark::Warning));
    }
    sections.extend(loss::sections(history));
    sections.extend(stability::sections(history));
    sections.extend(vars::missing(info, history));
    sections.extend(vars::shares(info, history));
    sections.extend(limit::sections(info, history));
    sections.extend(other_scalars(history));
    sections.extend(about::sections(info, history, seconds));
    let is_running = info.state == State::Running;
    Page {
        title: format!("Training run {name}"),
        subtitle: subtitle(info, history, seconds),
        refresh: is_running.then_some(Refresh {
            seconds: RELOAD_SECONDS,
        }),
        sections,
    }
}

fn subtitle(info: &RunInfo, history: &History, seconds: f64) -> String {
    let step = history.last.as_ref().map_or(0, |row| row.step);
    let of = info
        .total_steps
        .map_or_else(String::new, |total| format!(" of {total}"));
    let state = match info.state {
        State::Running => "Running: step",
        State::Stopped => "Stopped at step",
        State::Finished => "Finished at step",
    };
    let logged = if history.steps == step {
        String::new()
    } else {
        format!(" ({} logged)", count(history.steps, "step"))
    };
    format!("{state} {step}{of}{logged}, after {}", time(seconds))
}

/// What was logged besides losses.
fn other_scalars(history: &History) -> Vec<Section> {
    let others = history.scalars.iter();
    let others = others.filter(|(name, _)| loss::is_loss(name).is_none());
    let panel = |(name, curve): (&String, &Curve)| Panel {
        y_label: name.clone(),
        lines: vec![line(name, curve, 0)],
        ..Panel::default()
    };
    let panels: Vec<Panel> = others.map(panel).collect();
    if panels.is_empty() {
        return Vec::new();
    }
    let chart = LineChart {
        x_label: "step".into(),
        panels,
        ..LineChart::default()
    };
    vec![heading("What else was logged?"), Section::LineChart(chart)]
}

fn heading(text: &str) -> Section {
    Section::Heading { text: text.into() }
}

fn text(text: impl Into<String>, mark: Mark) -> Section {
    Section::Text {
        text: text.into(),
        mark,
    }
}

fn line(name: &str, curve: &Curve, style: usize) -> Line {
    let points = curve.points();
    Line {
        name: name.into(),
        // Few points may be far apart.
        markers: points.len() <= 50,
        points,
        style,
        ..Line::default()
    }
}

/// Names in a sentence: at most `most`, then how many more there are.
fn listed(names: &[&str], most: usize) -> String {
    let shown = names[..names.len().min(most)].join(", ");
    match names.len().saturating_sub(most) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::listed;

    #[test]
    fn many_names_are_counted() {
        assert_eq!(listed(&["a", "b"], 2), "a, b");
        assert_eq!(listed(&["a", "b", "c", "d"], 2), "a, b and 2 more");
    }
}
