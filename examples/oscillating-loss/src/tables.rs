//! The tables that a command ends with, for the terminal and for the page.

use candle_grad_clip_log::page::Table;
use comfy_table::{CellAlignment, presets};

use crate::baseline::Baselines;
use crate::outcome::Outcome;
use crate::run::Run;
use crate::score::{decades, median};
use crate::standing::Standing;

/// Four significant digits; a non-finite value says so.
#[must_use]
pub fn number(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let magnitude = value.abs().log10().floor();
    if (-4.0..6.0).contains(&magnitude) {
        format!("{value:.*}", (3.0 - magnitude).max(0.0) as usize)
    } else {
        format!("{value:.2e}")
    }
}

/// A range of learning rates, in words.
#[must_use]
pub fn range(usable: Option<(f64, f64)>) -> String {
    match usable {
        None => "no rate".to_owned(),
        Some((low, high)) if low < high => {
            format!(
                "{low:.1e} to {high:.1e} ({:.1} decades)",
                decades((low, high))
            )
        }
        Some((only, _)) => format!("only {only:e}"),
    }
}

/// A table as text that is Markdown, too.
#[must_use]
pub fn text(table: &Table) -> String {
    let mut text = comfy_table::Table::new();
    text.load_style(presets::ASCII_MARKDOWN);
    text.set_header(&table.columns);
    text.add_rows(&table.rows);
    for column in text.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    text.to_string()
}

fn table(title: &str, columns: &[&str]) -> Table {
    Table {
        title: title.to_owned(),
        columns: columns.iter().map(ToString::to_string).collect(),
        rows: Vec::new(),
    }
}

/// Test loss by step, a column an arm.
#[must_use]
pub fn curves(runs: &[Run]) -> Table {
    let mut table = table("Test loss by step", &["step"]);
    let arms = runs.iter().map(|run| run.settings.arm.to_string());
    table.columns.extend(arms);
    let last = runs.iter().map(|run| run.steps.len()).max().unwrap_or(0);
    let every = last.div_ceil(10).max(1);
    for step in (every..=last).step_by(every) {
        // The evaluation at this step, or the one before it.
        let loss = |run: &Run| {
            if run.steps.len() < step {
                return "-".to_owned();
            }
            let mut past = run.steps[..step].iter().rev();
            past.find_map(|step| step.test_loss)
                .map_or_else(String::new, number)
        };
        let row = std::iter::once(step.to_string()).chain(runs.iter().map(loss));
        table.rows.push(row.collect());
    }
    table
}

/// Median test loss by learning rate, a row an arm.
#[must_use]
pub fn grid(standings: &[Standing]) -> Table {
    let title = "Best test loss by learning rate (median over the seeds; NaN: half of them or more \
                 diverged)";
    let mut table = table(title, &["arm"]);
    let longest = standings.iter().max_by_key(|standing| standing.curve.len());
    let rates = longest.iter().flat_map(|standing| &standing.curve);
    table.columns.extend(rates.map(|(lr, _)| format!("{lr:e}")));
    for standing in standings {
        let loss = |(_, loss): &(f64, f64)| {
            if loss.is_finite() {
                number(*loss)
            } else {
                "NaN".to_owned()
            }
        };
        let losses = standing.curve.iter().map(loss);
        let row = std::iter::once(standing.arm.to_string()).chain(losses);
        table.rows.push(row.collect());
    }
    table
}

/// The baselines, and each arm at its own best learning rate.
#[must_use]
pub fn standings(standings: &[Standing], baselines: &Baselines) -> Table {
    let title =
        "Each arm at its own best learning rate (means over the seeds, best loss the median)";
    let columns = [
        "arm",
        "lr",
        "final test loss",
        "best test loss",
        "roughness",
        "clipped",
        "diverged",
        "ms a step",
        "usable learning rates",
    ];
    let mut table = table(title, &columns);
    for (name, loss) in [
        ("constant", baselines.constant),
        ("persistence", baselines.persistence),
    ] {
        let mut row = vec![String::new(); columns.len()];
        name.clone_into(&mut row[0]);
        row[3] = number(loss);
        table.rows.push(row);
    }
    for standing in standings {
        let runs = standing.at_best();
        let mean = |value: fn(&Outcome) -> f64| {
            runs.iter().map(|run| value(run)).sum::<f64>() / runs.len().max(1) as f64
        };
        let mut row = vec![standing.arm.to_string()];
        if runs.is_empty() {
            row.extend(["-", "NaN", "NaN", "", ""].map(String::from));
        } else {
            row.extend([
                format!("{:e}", standing.best.0),
                number(mean(|run| run.final_test_loss.unwrap_or(f64::NAN))),
                number(standing.best.1),
                number(mean(|run| run.roughness.unwrap_or(f64::NAN))),
                format!("{:.0} %", 100.0 * mean(|run| run.clipped_fraction)),
            ]);
        }
        let time = Some(mean(|run| run.ms_per_step)).filter(|_| !runs.is_empty());
        row.extend([
            format!("{} of {}", standing.diverged().count(), standing.runs.len()),
            time.map_or_else(String::new, |time| format!("{time:.1}")),
            range(standing.usable),
        ]);
        table.rows.push(row);
    }
    table
}

/// Each rule of a study at its own best learning rate, the best one first.
#[must_use]
pub fn study(title: &str, standings: &[Standing]) -> Table {
    let columns = [
        "rule",
        "best rate",
        "test loss, median",
        "lowest to highest",
        "seeds",
        "roughness",
        "clipped",
        "usable rates (decades)",
        "diverged",
    ];
    let mut table = table(title, &columns);
    let mut sorted: Vec<&Standing> = standings.iter().collect();
    sorted.sort_by(|a, b| a.best.1.total_cmp(&b.best.1));
    table.rows = sorted.into_iter().map(study_row).collect();
    table
}

fn study_row(standing: &Standing) -> Vec<String> {
    let runs = standing.at_best();
    let loss = |run: &&Outcome| run.final_test_loss.unwrap_or(f64::INFINITY);
    let losses = || runs.iter().map(loss);
    let middle = |value: fn(&Outcome) -> f64| median(runs.iter().map(|run| value(run)));
    let usable = standing.usable.map(|range| {
        let (low, high) = range;
        format!("{low:.1e} to {high:.1e} ({:.1})", decades(range))
    });
    let diverged = standing.diverged().map(|run| run.settings.lr);
    let from = diverged.reduce(f64::min);
    let from = from.map_or_else(String::new, |lr| format!(", from {lr:e}"));
    let lowest_to_highest = losses().reduce(f64::min).zip(losses().reduce(f64::max));
    let lowest_to_highest =
        lowest_to_highest.map(|(low, high)| format!("{} to {}", number(low), number(high)));
    let clipped = middle(|run| run.clipped_fraction);
    vec![
        format!("`{}`", standing.arm),
        if runs.is_empty() {
            "-".to_owned()
        } else {
            format!("{:e}", standing.best.0)
        },
        number(standing.best.1),
        lowest_to_highest.unwrap_or_default(),
        runs.len().to_string(),
        middle(|run| run.roughness.unwrap_or(f64::INFINITY)).map_or_else(String::new, number),
        clipped.map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share)),
        usable.unwrap_or_default(),
        format!(
            "{} of {}{from}",
            standing.diverged().count(),
            standing.runs.len()
        ),
    ]
}
