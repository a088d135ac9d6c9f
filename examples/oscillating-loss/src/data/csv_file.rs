//! A user's own series: every numeric column of a CSV file, standardised.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{CONTEXT, TRAIN_SHARE, Weather, train_days};

/// Fewest rows that leave one window to test on (and then some to train on).
const MIN_ROWS: usize = ((CONTEXT + 1) as f64 / (1.0 - TRAIN_SHARE)) as usize;

impl Weather {
    /// Reads one series from a CSV file with a header line, a row a day (or any other step).
    ///
    /// Inputs are `target` and then all other columns whose first row is a number; each is
    /// standardised with the mean and deviation of the rows to train on, so the loss is in squared
    /// (cubed, ...) standard deviations of the target.
    ///
    /// # Errors
    /// If the file can't be read, `target` is missing or not a number, a value is not a finite
    /// number (with its line and column), or there are too few rows for one window to test on.
    pub fn from_csv(path: &Path, target: &str) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("can't read `{}`", path.display()))?;
        let mut reader = csv::ReaderBuilder::new()
            .trim(csv::Trim::All)
            .from_reader(file);
        let (names, mut rows) =
            read(&mut reader, target).with_context(|| format!("in `{}`", path.display()))?;
        standardise(&mut rows);
        let rows = rows
            .iter()
            .map(|row| row.iter().map(|value| *value as f32).collect());
        Self::split(names, &[rows.collect()])
    }
}

/// The numeric columns, the target first: their names and their rows.
fn read(reader: &mut csv::Reader<File>, target: &str) -> Result<(Vec<String>, Vec<Vec<f64>>)> {
    let header = reader.headers()?.clone();
    let Some(target) = header.iter().position(|name| name == target) else {
        let known = header.iter().collect::<Vec<_>>().join(", ");
        bail!("no column `{target}`; the columns are: {known}");
    };
    let mut columns = vec![target];
    let mut rows: Vec<Vec<f64>> = Vec::new();
    for record in reader.records() {
        let record = record?;
        if rows.is_empty() {
            let numeric = |column: &usize| record[*column].parse::<f64>().is_ok();
            columns.extend(
                (0..record.len())
                    .filter(|column| *column != target)
                    .filter(numeric),
            );
        }
        rows.push(
            columns
                .iter()
                .map(|column| number(&record, &header, *column))
                .collect::<Result<_>>()?,
        );
    }
    ensure!(
        rows.len() >= MIN_ROWS,
        "{} rows, but at least {MIN_ROWS} are needed: windows of {CONTEXT} rows and the one after, \
         also in the last quarter, which is for testing",
        rows.len()
    );
    Ok((
        columns
            .iter()
            .map(|column| header[*column].to_owned())
            .collect(),
        rows,
    ))
}

fn number(record: &csv::StringRecord, header: &csv::StringRecord, column: usize) -> Result<f64> {
    let text = &record[column];
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() => Ok(value),
        _ => {
            let line = record.position().map_or(0, csv::Position::line);
            bail!(
                "line {line}, column `{}`: expected a number, found `{text}`",
                &header[column]
            )
        }
    }
}

/// Gives every column mean 0 and deviation 1 over the rows to train on (a constant becomes 0).
fn standardise(rows: &mut [Vec<f64>]) {
    let train = train_days(rows.len());
    for column in 0..rows[0].len() {
        let values = || rows[..train].iter().map(|row| row[column]);
        let mean = values().sum::<f64>() / train as f64;
        let variance = values().map(|value| (value - mean).powi(2)).sum::<f64>() / train as f64;
        let deviation = if variance > 0.0 { variance.sqrt() } else { 1.0 };
        for row in &mut *rows {
            row[column] = (row[column] - mean) / deviation;
        }
    }
}
