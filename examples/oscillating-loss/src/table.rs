//! The tables that a run ends with.

use comfy_table::{CellAlignment, Table, presets};

use crate::baseline::Baselines;
use crate::run::Run;
use crate::score::decades;
use crate::summary::Standing;

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

/// Test loss by step, a column an arm.
#[must_use]
pub fn curves(runs: &[Run]) -> Table {
    let mut header = vec!["step".to_owned()];
    header.extend(runs.iter().map(|run| run.settings.arm.to_string()));
    let mut table = table(header);
    let last = runs
        .iter()
        .filter_map(|run| run.steps.last())
        .map(|step| step.step)
        .max();
    let rows = last.unwrap_or(0).div_ceil(10).max(1);
    for step in (rows..=last.unwrap_or(0)).step_by(rows) {
        // The evaluation at this step, or the one before it.
        let loss = |run: &Run| {
            if run.steps.len() < step {
                return "-".to_owned();
            }
            let mut past = run.steps[..step].iter().rev();
            past.find_map(|step| step.test_loss)
                .map_or_else(String::new, number)
        };
        table.add_row(std::iter::once(step.to_string()).chain(runs.iter().map(loss)));
    }
    table
}

/// Median test loss by learning rate, a row an arm.
#[must_use]
pub fn grid(standings: &[Standing]) -> Table {
    let rates = standings
        .iter()
        .map(|standing| &standing.curve)
        .max_by_key(|curve| curve.len());
    let mut header = vec!["arm".to_owned()];
    header.extend(rates.into_iter().flatten().map(|(lr, _)| format!("{lr:e}")));
    let mut table = table(header);
    for standing in standings {
        let losses = standing.curve.iter().map(|(_, loss)| {
            if loss.is_finite() {
                number(*loss)
            } else {
                "NaN".to_owned()
            }
        });
        table.add_row(std::iter::once(standing.arm.to_string()).chain(losses));
    }
    table
}

/// The baselines, and each arm at its own best learning rate.
#[must_use]
pub fn standings(standings: &[Standing], baselines: &Baselines) -> Table {
    let mut table = table([
        "arm",
        "lr",
        "final test loss",
        "best test loss",
        "roughness",
        "clipped",
        "diverged",
        "ms a step",
        "usable learning rates",
    ]);
    table.add_row(["constant", "", "", &number(baselines.constant)]);
    table.add_row(["persistence", "", "", &number(baselines.persistence)]);
    for standing in standings {
        let runs = standing.at_best();
        let mean = |value: fn(&Run) -> f64| {
            runs.iter().map(|run| value(run)).sum::<f64>() / runs.len().max(1) as f64
        };
        let roughness = mean(|run| run.roughness().unwrap_or(f64::NAN));
        let mut row = vec![standing.arm.to_string()];
        if runs.is_empty() {
            row.extend(["-", "NaN", "NaN", "", "", ""].map(String::from));
        } else {
            row.extend([
                format!("{:e}", standing.best.0),
                number(mean(Run::final_test_loss)),
                number(standing.best.1),
                number(roughness),
                format!("{:.0} %", 100.0 * mean(Run::clipped_fraction)),
            ]);
        }
        row.truncate(6);
        row.extend([
            format!("{} of {}", standing.num_diverged(), standing.runs.len()),
            if runs.is_empty() {
                String::new()
            } else {
                format!("{:.1}", mean(Run::ms_per_step))
            },
            range(standing.usable),
        ]);
        table.add_row(row);
    }
    table
}

fn table<T: Into<String>>(header: impl IntoIterator<Item = T>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(header.into_iter().map(Into::into).collect::<Vec<String>>());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        let cases = [
            (0.09134, "0.09134"),
            (10.2422, "10.24"),
            (0.0, "0"),
            (123_456.0, "123456"),
            (1.234e9, "1.23e9"),
            (1.5e-9, "1.50e-9"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "inf"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn ranges_read_well() {
        assert_eq!(range(None), "no rate");
        assert_eq!(range(Some((3e-3, 3e-3))), "only 3e-3");
        assert_eq!(range(Some((1e-3, 1e-1))), "1.0e-3 to 1.0e-1 (2.0 decades)");
    }
}
