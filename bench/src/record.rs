//! The results: JSON lines for programs, a table for people.

use std::io::Write;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// One rival's times for one operation on one set.
#[derive(Debug, Serialize)]
pub(crate) struct Record {
    pub(crate) set: &'static str,
    pub(crate) dtype: &'static str,
    pub(crate) op: &'static str,
    #[serde(rename = "impl")]
    pub(crate) rival: &'static str,
    pub(crate) threads: usize,
    pub(crate) median_ms: f64,
    pub(crate) min_ms: f64,
    pub(crate) floor_ms: f64,
    pub(crate) ratio_to_floor: f64,
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
