//! The page that a sweep and the story end with.

use candle_grad_clip_log::page::{Line, LineChart, Mark, Page, Panel, Section};

use crate::baseline::Baselines;
use crate::experiment::Experiment;
use crate::outcome::Outcome;
use crate::score::median;
use crate::settings::Settings;
use crate::standing::Standing;
use crate::{conclusion, tables};

/// The conclusion, the sweep's picture and tables, then `more`.
#[must_use]
pub fn sweep(experiment: &Experiment, standings: &[Standing], more: Vec<Section>) -> Page {
    let Settings {
        power,
        alpha,
        steps,
        ..
    } = experiment.base;
    let mut sections = vec![heading("Does clipping help?")];
    for text in conclusion::sentences(standings, experiment) {
        let mark = Mark::None;
        sections.push(Section::Text { text, mark });
    }
    sections.push(heading("Which learning rates work?"));
    sections.push(Section::LineChart(chart(standings, &experiment.baselines)));
    sections.push(Section::Table(tables::grid(standings)));
    let standings = tables::standings(standings, &experiment.baselines);
    sections.push(Section::Table(standings));
    sections.extend(more);
    let optimizer = experiment.base.optimizer_name();
    Page {
        title: "A weighted power loss, with and without clipping".to_owned(),
        subtitle: format!(
            "mean(w |e|^{power}), w = 1 + {alpha} |y|, {optimizer}, {steps} steps a run"
        ),
        refresh: None,
        sections,
    }
}

/// A heading of a page.
#[must_use]
pub fn heading(text: &str) -> Section {
    let text = text.to_owned();
    Section::Heading { text }
}

/// Best test loss above, roughness below, by learning rate; a line an arm, with its seeds.
fn chart(standings: &[Standing], baselines: &Baselines) -> LineChart {
    let panel = |y_label: &str, value: fn(&Outcome) -> Option<f64>, levels| Panel {
        y_label: y_label.to_owned(),
        y_log: true,
        lines: standings
            .iter()
            .enumerate()
            .flat_map(|(style, standing)| by_rate(standing, style, value))
            .collect(),
        levels,
        ..Panel::default()
    };
    let levels = vec![
        ("constant".to_owned(), baselines.constant),
        ("persistence".to_owned(), baselines.persistence),
    ];
    LineChart {
        title: "Median over the seeds (thin: each seed; crosses: diverged)".to_owned(),
        x_label: "learning rate".to_owned(),
        x_log: true,
        panels: vec![
            panel("best test loss", |run| run.best_test_loss, levels),
            panel("roughness", |run| run.roughness, Vec::new()),
        ],
        ..LineChart::default()
    }
}

/// Each seed of one arm, then the median over them; NaN where a run diverged.
fn by_rate(
    standing: &Standing,
    style: usize,
    value: fn(&Outcome) -> Option<f64>,
) -> impl Iterator<Item = Line> {
    let line = |points: Vec<(f64, f64)>, faint: bool| Line {
        name: standing.arm.to_string(),
        points,
        markers: !faint,
        faint,
        style,
        ..Line::default()
    };
    let mut seeds: Vec<u64> = standing.runs.iter().map(|run| run.settings.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let of_seed = |seed: u64| {
        let runs = standing.runs.iter().filter(|run| run.settings.seed == seed);
        let point = |run: &&Outcome| (run.settings.lr, value(run).unwrap_or(f64::NAN));
        line(runs.map(point).collect(), true)
    };
    let middle = |(lr, _): &(f64, f64)| {
        let values = standing.at(*lr).into_iter().map(value);
        let middle = median(values.map(|value| value.unwrap_or(f64::INFINITY)));
        (*lr, middle.unwrap_or(f64::NAN))
    };
    let mut lines: Vec<Line> = seeds.into_iter().map(of_seed).collect();
    lines.push(line(standing.curve.iter().map(middle).collect(), false));
    lines.into_iter()
}
