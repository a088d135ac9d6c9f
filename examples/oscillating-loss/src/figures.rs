//! The three pictures.

use crate::baseline::Baselines;
use crate::run::{Run, Step};
use crate::score::median;
use crate::settings::Settings;
use crate::summary::Standing;
use plot::{Chart, Panel, Series};

/// `loss`: test loss above, loss of each batch below, by step; a line an arm.
#[must_use]
pub fn loss(runs: &[Run]) -> Chart {
    let panel = |y_label: &str, value: fn(&Step) -> Option<f64>| Panel {
        x_label: "step".into(),
        y_label: y_label.into(),
        y_log: true,
        series: lines(runs, value),
        ..Panel::default()
    };
    Chart {
        title: format!("Weighted power loss, {}", setting(runs)),
        panels: vec![
            panel("test loss", |step| step.test_loss),
            panel("loss of the batch", |step| Some(step.train_loss)),
        ],
    }
}

/// `grad_norm`: norm of all gradients before and after clipping, a panel an arm, a fixed limit as a
/// line.
#[must_use]
pub fn grad_norm(runs: &[Run]) -> Chart {
    let panel = |run: &Run| {
        let line = |when: &str, color_index, norm: fn(&Step) -> f64| Series {
            name: format!("{when} clipping"),
            points: points(run, |step| Some(norm(step))),
            color_index,
            dashed: color_index > 0,
            ..Series::default()
        };
        let mut before = line("before", 0, |step| step.total_norm);
        before.nan_at = diverged_at(run).into_iter().collect();
        let mut series = vec![before];
        let mut horizontal = Vec::new();
        let arm = &run.settings.arm;
        if !arm.is_none() {
            series.push(line("after", 1, |step| step.clipped_norm));
        }
        // Other limits move, or are none of this norm.
        if let Some(max_norm) = arm.max_norm() {
            horizontal.push((format!("max_norm {max_norm}"), max_norm));
        }
        Panel {
            title: arm.to_string(),
            x_label: "step".into(),
            y_label: "norm".into(),
            y_log: true,
            series,
            horizontal,
            ..Panel::default()
        }
    };
    Chart {
        title: format!("Norm of all gradients, {}", setting(runs)),
        panels: runs.iter().map(panel).collect(),
    }
}

/// `sweep`: best test loss above, roughness below, by learning rate; a line an arm, with its seeds.
#[must_use]
pub fn sweep(standings: &[Standing], baselines: &Baselines) -> Chart {
    let panel = |y_label: &str, value: fn(&Run) -> f64, horizontal| Panel {
        x_label: "learning rate".into(),
        y_label: y_label.into(),
        x_log: true,
        y_log: true,
        series: standings
            .iter()
            .enumerate()
            .map(|arm| by_rate(arm, value))
            .collect(),
        horizontal,
        ..Panel::default()
    };
    let lines = vec![
        ("constant".into(), baselines.constant),
        ("persistence".into(), baselines.persistence),
    ];
    let title = standings.first().map_or_else(String::new, |standing| {
        let settings = &standing.runs[0].settings;
        let Settings { power, steps, .. } = *settings;
        format!(
            "Weighted power loss by learning rate, {}, power {power}, {steps} steps",
            settings.optimizer_name()
        )
    });
    Chart {
        title,
        panels: vec![
            panel("best test loss", Run::best_test_loss, lines),
            panel(
                "roughness",
                |run| run.roughness().unwrap_or(f64::NAN),
                Vec::new(),
            ),
        ],
    }
}

/// One arm: the median over its seeds, and each seed; NaN where the median run diverged.
fn by_rate((color_index, arm): (usize, &Standing), value: fn(&Run) -> f64) -> Series {
    let mut seeds: Vec<u64> = arm.runs.iter().map(|run| run.settings.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let of_seed = |seed: u64| {
        let runs = arm.runs.iter().filter(|run| run.settings.seed == seed);
        runs.map(|run| (run.settings.lr, value(run))).collect()
    };
    let diverged = |lr: f64| arm.at(lr).iter().any(|run| run.diverged.is_some());
    let middle = |lr: f64| median(arm.at(lr).into_iter().map(value)).unwrap_or(f64::NAN);
    let rates = arm.curve.iter().map(|(lr, _)| *lr);
    Series {
        name: arm.arm.to_string(),
        points: rates.clone().map(|lr| (lr, middle(lr))).collect(),
        faint: seeds.into_iter().map(of_seed).collect(),
        color_index,
        dashed: false,
        nan_at: rates.filter(|lr| diverged(*lr)).collect(),
    }
}

fn lines(runs: &[Run], value: fn(&Step) -> Option<f64>) -> Vec<Series> {
    let line = |(color_index, run): (usize, &Run)| Series {
        name: run.settings.arm.to_string(),
        points: points(run, value),
        color_index,
        nan_at: diverged_at(run).into_iter().collect(),
        ..Series::default()
    };
    runs.iter().enumerate().map(line).collect()
}

fn points(run: &Run, value: impl Fn(&Step) -> Option<f64>) -> Vec<(f64, f64)> {
    run.steps
        .iter()
        .filter_map(|step| Some((step.step as f64, value(step)?)))
        .collect()
}

fn diverged_at(run: &Run) -> Option<f64> {
    run.diverged.as_ref().map(|_| (run.steps.len() + 1) as f64)
}

/// The title of a picture of one run.
#[must_use]
pub fn title(run: &Run) -> String {
    let setting = setting(std::slice::from_ref(run));
    format!("Gradient norm of each Var, {}, {setting}", run.settings.arm)
}

fn setting(runs: &[Run]) -> String {
    runs.first().map_or_else(String::new, |run| {
        let Settings { power, lr, .. } = run.settings;
        let optimizer = run.settings.optimizer_name();
        format!("{optimizer}, power {power}, learning rate {lr:e}")
    })
}
