//! What a run finds out, and the results of the plain run: JSON lines for programs, a table for
//! people.

use std::io::Write;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::op::Impl;

/// One rival's times for one operation on one set.
#[derive(Debug, Serialize)]
pub(crate) struct Record<'a> {
    pub(crate) set: &'static str,
    pub(crate) dtype: &'static str,
    pub(crate) op: &'static str,
    #[serde(rename = "impl")]
    pub(crate) rival: &'a str,
    pub(crate) threads: usize,
    pub(crate) median_ms: f64,
    pub(crate) min_ms: f64,
    pub(crate) floor_ms: f64,
    pub(crate) ratio_to_floor: f64,
}

/// One rival's times for one operation on one set.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct GradNorms {
    pub(crate) set: &'static str,
    pub(crate) dtype: &'static str,
    pub(crate) op: &'static str,
    pub(crate) rival: String,
    pub(crate) calls: usize,
    pub(crate) median_ms: f64,
    pub(crate) min_ms: f64,
    /// Relative, where the rival says what the norm is.
    pub(crate) norm_error: Option<f64>,
}

/// The floor's median, if it is among these rows of one operation.
pub(crate) fn floor_ms(rows: &[GradNorms]) -> f64 {
    let floor = rows.iter().find(|row| row.rival == Impl::Floor.name());
    floor.map_or(f64::NAN, |floor| floor.median_ms)
}

/// All that a run found out.
#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) measured: Vec<GradNorms>,
    /// Names and versions of the frameworks.
    pub(crate) versions: Vec<String>,
    /// What was not timed, and why.
    pub(crate) notes: Vec<String>,
}

impl Findings {
    /// Puts what was timed later beside the rest of its set.
    pub(crate) fn add_beside(&mut self, later: Vec<GradNorms>) {
        for row in later {
            let beside = |other: &GradNorms| other.set == row.set && other.dtype == row.dtype;
            let end = self.measured.iter().rposition(beside).map_or(0, |i| i + 1);
            self.measured.insert(end, row);
        }
    }

    pub(crate) fn note(&mut self, note: String) {
        eprintln!("{note}");
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

/// One rival's time for one size.
#[derive(Debug)]
pub(crate) struct Point {
    pub(crate) op: &'static str,
    /// What grows.
    pub(crate) of: &'static str,
    pub(crate) count: usize,
    pub(crate) rival: String,
    pub(crate) median_ms: f64,
    pub(crate) calls: usize,
}

/// Where results go.
pub(crate) enum Output {
    /// Each at once.
    Json,
    /// All at the end, as columns align.
    Table(Box<Table>),
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        if json {
            return Self::Json;
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header([
            "set",
            "dtype",
            "op",
            "impl",
            "threads",
            "median ms",
            "min ms",
            "ratio to floor",
        ]);
        for column in table.column_iter_mut().skip(4) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        Self::Table(Box::new(table))
    }

    pub(crate) fn add(&mut self, record: &Record) -> Result<()> {
        match self {
            Self::Json => {
                let mut out = std::io::stdout().lock();
                serde_json::to_writer(&mut out, record)?;
                writeln!(out)?;
            }
            Self::Table(table) => {
                eprintln!(
                    "{} {} {} {}",
                    record.set, record.dtype, record.op, record.rival
                );
                table.add_row([
                    record.set.to_string(),
                    record.dtype.to_string(),
                    record.op.to_string(),
                    record.rival.to_string(),
                    record.threads.to_string(),
                    format!("{:.3}", record.median_ms),
                    format!("{:.3}", record.min_ms),
                    format!("{:.2}", record.ratio_to_floor),
                ]);
            }
        }
        Ok(())
    }

    pub(crate) fn finish(self) {
        if let Self::Table(table) = self {
            println!("{table}");
        }
    }
}

/// Of sorted times, at least one.
pub(crate) fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        assert_eq!(super::median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(super::median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }
}
