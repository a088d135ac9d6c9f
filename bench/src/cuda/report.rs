//! RESULTS-cuda.md, and the same for programs.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::cuda::Row;
use crate::cuda::case::Impl;
use crate::cuda::targets::TARGETS;
use crate::cuda::task::{Start, Task};
use crate::record::{Findings, Measured};
use crate::results::{about, digits, machine, median_of, table, versions};

/// Prints the results and writes them into `out`.
pub(crate) fn write(out: &Path, gpu: &str, rows: &[Row], found: &Findings) -> Result<()> {
    let text = markdown(gpu, rows, found)?;
    println!("{text}");
    let table = std::fs::write(out.join("RESULTS-cuda.md"), text);
    std::fs::write(out.join("results-cuda.jsonl"), lines(gpu, rows)?)?;
    Ok(table?)
}

/// A JSON object a line.
fn lines(gpu: &str, rows: &[Row]) -> Result<String> {
    #[derive(Serialize)]
    struct Line<'a> {
        gpu: &'a str,
        #[serde(flatten)]
        row: &'a Row,
    }
    let mut lines = String::new();
    for row in rows {
        lines += &serde_json::to_string(&Line { gpu, row })?;
        lines.push('\n');
    }
    Ok(lines)
}

fn markdown(gpu: &str, rows: &[Row], found: &Findings) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "# Results on a GPU\n")?;
    writeln!(
        text,
        "Written by `cargo run --release -p bench --features cuda -- cuda`; README.md says what is timed and how.\n"
    )?;
    let today = jiff::Timestamp::now();
    writeln!(text, "- Date: {}", today.strftime("%Y-%m-%d"))?;
    writeln!(text, "- GPU: {gpu}")?;
    writeln!(text, "- Host: {}", machine())?;
    writeln!(text, "- Versions: {}", versions(found).join("; "))?;
    for note in &found.notes {
        writeln!(text, "- {note}")?;
    }
    targets(&mut text, rows)?;
    let mut groups: Vec<_> = rows
        .iter()
        .map(|row| (row.measured.set, row.measured.dtype))
        .collect();
    groups.dedup();
    for (set, dtype) in groups {
        writeln!(text, "\n## {set}, {dtype}: {}", about(set))?;
        for start in Start::ALL {
            let of_start = |row: &&Row| {
                row.start == start && row.measured.set == set && row.measured.dtype == dtype
            };
            section(
                &mut text,
                start,
                &rows.iter().filter(of_start).collect::<Vec<_>>(),
            )?;
        }
    }
    Ok(text)
}

/// Pass or miss, from both starts.
fn targets(text: &mut String, rows: &[Row]) -> Result<()> {
    let verdicts: Vec<_> = TARGETS
        .iter()
        .flat_map(|target| target.verdicts(rows))
        .collect();
    if verdicts.is_empty() {
        return Ok(());
    }
    let [first, second] = Start::ALL;
    writeln!(
        text,
        "\n## Targets\n\n| | {first} | {second} |\n|---|---|---|"
    )?;
    for verdict in verdicts {
        let [first, second] = verdict.ratios.map(|ratio| match ratio {
            Some((ratio, true)) => format!("{ratio:.2}, pass"),
            Some((ratio, false)) => format!("{ratio:.2}, **miss**"),
            None => String::new(),
        });
        writeln!(text, "| {} | {first} | {second} |", verdict.what)?;
    }
    Ok(())
}

/// The times of a set from one start.
fn section(text: &mut String, start: Start, rows: &[&Row]) -> Result<()> {
    writeln!(
        text,
        "\nFrom a GPU that is {start}: median milliseconds, and how many times the floor's:\n"
    )?;
    let measured: Vec<&Measured> = rows.iter().map(|row| &row.measured).collect();
    table(text, &Task::ALL.map(Task::name), &measured, |row| {
        let floor = median_of(&measured, row.op, Impl::Floor.name());
        format!("{} ({:.2})", digits(row.median_ms), row.median_ms / floor)
    })?;
    let floors = rows
        .iter()
        .filter(|row| row.measured.rival == Impl::Floor.name());
    let rates: Vec<String> = floors
        .map(|row| {
            let per_second = row.bytes_moved as f64 / 1e9 / (row.measured.median_ms / 1e3);
            format!("{} {per_second:.0}", row.measured.op)
        })
        .collect();
    writeln!(text, "\nThe floor in GB/s: {}.", rates.join(", "))?;
    let norms: Vec<String> = rows
        .iter()
        .filter(|row| row.measured.op == Task::TotalNorm.name())
        .filter_map(|row| {
            Some(format!(
                "{} {:.0e}",
                row.measured.rival, row.measured.norm_error?
            ))
        })
        .collect();
    if !norms.is_empty() {
        writeln!(text, "Relative error of the norm: {}.", norms.join(", "))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(start: Start, rival: &str, median_ms: f64) -> Row {
        Row {
            start,
            measured: Measured {
                set: "E",
                dtype: "f32",
                op: "total_norm",
                rival: rival.to_owned(),
                calls: 15,
                median_ms,
                min_ms: median_ms,
                norm_error: (rival == "pytorch").then_some(3e-4),
            },
            bytes_moved: 6_000_000_000,
            ratio_to_floor: median_ms / 2.0,
        }
    }

    #[test]
    fn a_section_has_times_ratios_and_the_floors_rate() -> Result<()> {
        let rows = [
            row(Start::Idle, "candle-grad-clip", 2.5),
            row(Start::Idle, "floor", 2.0),
            row(Start::Busy, "candle-grad-clip", 2.1),
            row(Start::Busy, "floor", 2.0),
            row(Start::Busy, "pytorch", 4.0),
        ];
        let found = Findings {
            notes: vec!["A does not fit".into()],
            ..Findings::default()
        };
        let text = markdown("a card, driver 1", &rows, &found)?;
        for part in [
            "- GPU: a card, driver 1",
            "- A does not fit",
            "| E f32 total_norm: at most 1.15 times the floor | 1.25, **miss** | 1.05, pass |",
            "## E, f32: GPT-2 XL",
            "| candle-grad-clip | 2.50 (1.25) |",
            "| pytorch | 4.00 (2.00) |",
            "The floor in GB/s: total_norm 3000.",
            "Relative error of the norm: pytorch 3e-4.",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let lines = lines("a card", &rows)?;
        let line: serde_json::Value = serde_json::from_str(lines.lines().nth(3).unwrap_or(""))?;
        assert_eq!(
            (&line["start"], &line["rival"]),
            (&"busy".into(), &"floor".into())
        );
        Ok(())
    }
}
