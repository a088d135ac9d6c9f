//! RESULTS.md: what was run where, and tables of times and ratios.

use std::fmt::Write;
use std::process::Command;

use anyhow::Result;

use crate::op::{Impl, Op, PASTE_IN_KEPT};
use crate::record::{Findings, GradNorms};

/// What `found` says, for people.
pub(crate) fn markdown(found: &Findings, threads: usize) -> Result<String> {
    let mut text = head("Results", "-- compare", found)?;
    writeln!(text, "- Threads: {threads}")?;
    if found.measured.iter().any(|row| row.rival == PASTE_IN_KEPT) {
        writeln!(
            text,
            "- {PASTE_IN_KEPT}: afterwards, in a process of its own with MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=1000000000000",
        )?;
    }
    for (set, dtype) in groups(&found.measured) {
        let rows: Vec<&GradNorms> = of(&found.measured, set, dtype).collect();
        writeln!(text, "\n## {set}, {dtype}: {}\n", about(set))?;
        section(&mut text, &Op::ALL.map(Op::name), &rows)?;
    }
    Ok(text)
}

/// What was run where.
pub(crate) fn head(title: &str, args: &str, found: &Findings) -> Result<String> {
    let mut text = format!("# {title}\n\n");
    writeln!(
        text,
        "Written by `cargo run --release -p bench {args}`; README.md says what is timed and how.\n"
    )?;
    let today = jiff::Timestamp::now();
    writeln!(text, "- Date: {}", today.strftime("%Y-%m-%d"))?;
    writeln!(text, "- Machine: {}", machine())?;
    writeln!(text, "- Versions: {}", versions(found).join("; "))?;
    for note in &found.notes {
        writeln!(text, "- {note}")?;
    }
    Ok(text)
}

/// The times of a set, and how they compare.
pub(crate) fn section(text: &mut String, ops: &[&str], rows: &[&GradNorms]) -> Result<()> {
    writeln!(
        text,
        "Median milliseconds, and how many times the floor's:\n"
    )?;
    table(text, ops, rows, |row| {
        let floor = median_of(rows, row.op, Impl::Floor.name());
        format!("{} ({:.2})", digits(row.median_ms), row.median_ms / floor)
    })?;
    let ours = Impl::CandleGradClip.name();
    writeln!(text, "\nHow many times {ours}'s:\n")?;
    table(text, ops, rows, |row| {
        let ours = median_of(rows, row.op, ours);
        format!("{:.2}", row.median_ms / ours)
    })?;
    let norms: Vec<String> = rows
        .iter()
        .filter(|row| row.op == Op::TotalNorm.name())
        .filter_map(|row| Some(format!("{} {:.0e}", row.rival, row.norm_error?)))
        .collect();
    if !norms.is_empty() {
        writeln!(text, "\nRelative error of the norm: {}.", norms.join(", "))?;
    }
    Ok(())
}

/// The sets in their dtypes, in the order they were timed.
pub(crate) fn groups(measured: &[GradNorms]) -> Vec<(&'static str, &'static str)> {
    let mut groups: Vec<_> = measured.iter().map(|row| (row.set, row.dtype)).collect();
    groups.dedup();
    groups
}

pub(crate) fn of<'a>(
    measured: &'a [GradNorms],
    set: &str,
    dtype: &str,
) -> impl Iterator<Item = &'a GradNorms> {
    measured
        .iter()
        .filter(move |row| row.set == set && row.dtype == dtype)
}

/// NaN where it was not timed.
fn median_of(rows: &[&GradNorms], op: &str, rival: &str) -> f64 {
    let row = rows.iter().find(|row| row.op == op && row.rival == rival);
    row.map_or(f64::NAN, |row| row.median_ms)
}

/// A line a rival, a column an operation, if anything of it was timed.
fn table(
    text: &mut String,
    ops: &[&str],
    rows: &[&GradNorms],
    cell: impl Fn(&GradNorms) -> String,
) -> Result<()> {
    let ops: Vec<&str> = ops
        .iter()
        .copied()
        .filter(|op| rows.iter().any(|row| row.op == *op))
        .collect();
    let mut rivals: Vec<&str> = Vec::new();
    for row in rows {
        if !rivals.contains(&row.rival.as_str()) {
            rivals.push(&row.rival);
        }
    }
    writeln!(text, "| | {} |", ops.join(" | "))?;
    writeln!(text, "|---|{}", "---:|".repeat(ops.len()))?;
    for rival in rivals {
        let cells: Vec<String> = ops
            .iter()
            .map(|op| {
                let row = rows.iter().find(|row| row.op == *op && row.rival == rival);
                row.map_or(String::new(), |row| cell(row))
            })
            .collect();
        writeln!(text, "| {rival} | {} |", cells.join(" | "))?;
    }
    Ok(())
}

pub(crate) fn about(set: &str) -> &'static str {
    match set {
        "A" => "one tensor of 64 Mi",
        "B" => "GPT-2 small, 148 tensors",
        "C" => "10,000 tensors of 64 to 4096",
        "E" => "GPT-2 XL, 580 tensors",
        _ => "30 tensors of about 1 k",
    }
}

/// Three significant digits.
fn digits(ms: f64) -> String {
    let before_point = ms.max(1e-9).log10().floor() as i32 + 1;
    format!("{ms:.*}", (3 - before_point).clamp(0, 5) as usize)
}

/// The first line that a program prints, if it runs.
pub(crate) fn first_line(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().next().map(str::to_owned)
}

fn versions(found: &Findings) -> Vec<String> {
    let mut ours = format!("candle-grad-clip {}", env!("CARGO_PKG_VERSION"));
    if let Some(commit) = first_line("git", &["describe", "--always", "--dirty"]) {
        write!(ours, " at {commit}").ok();
    }
    let mut versions = vec![ours];
    versions.extend(first_line("rustc", &["--version"]));
    versions.extend(found.versions.iter().cloned());
    versions
}

/// Processor, cores, memory and system, as far as the system says.
pub(crate) fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpu = field(&read("/proc/cpuinfo"), "model name");
    let mut parts = vec![format!(
        "{} with {cores} cores",
        cpu.as_deref().unwrap_or("a processor")
    )];
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kib = memory.and_then(|m| m.split_whitespace().next()?.parse::<f64>().ok());
    parts.extend(kib.map(|kib| format!("{:.0} GiB", kib / 1024.0 / 1024.0)));
    parts.push(format!(
        "{} {}",
        std::env::consts::OS,
        std::env::consts::ARCH
    ));
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(op: &'static str, rival: &str, median_ms: f64, norm_error: Option<f64>) -> GradNorms {
        GradNorms {
            set: "D",
            dtype: "f32",
            op,
            rival: rival.to_owned(),
            calls: 1,
            median_ms,
            min_ms: median_ms,
            norm_error,
        }
    }

    #[test]
    fn tables_have_times_and_both_ratios() -> Result<()> {
        let found = Findings {
            measured: vec![
                row("clip_adamw", "candle-grad-clip", 0.03, None),
                row("clip_adamw", "floor", 0.02, None),
                row("clip_adamw", "pytorch", 0.3, None),
                row("total_norm", "pytorch", 0.3, Some(-2.4e-7)),
                row("clip_sgd", "floor", 0.01, None),
            ],
            versions: vec!["torch 1".into()],
            notes: vec!["burn is not installed".into()],
        };
        let text = markdown(&found, 2)?;
        for part in [
            "## D, f32",
            "| | total_norm | clip_adamw | clip_sgd |",
            "| pytorch | 0.300 (NaN) | 0.300 (15.00) |  |",
            "| pytorch | NaN | 10.00 |  |",
            "Relative error of the norm: pytorch -2e-7.",
            "- burn is not installed",
            "torch 1",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        Ok(())
    }

    #[test]
    fn three_digits_are_shown() {
        let shown = [0.0, 0.01234, 0.1234, 1.234, 123.4, 1234.0].map(digits);
        assert_eq!(shown, ["0.00000", "0.0123", "0.123", "1.23", "123", "1234"]);
    }
}
