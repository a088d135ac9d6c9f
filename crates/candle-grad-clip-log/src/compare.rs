//! The runs of a folder, laid over each other.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::csv_file;
use crate::error::{Error, Result};
use crate::folder::{self, METRICS, PAGE, SCALARS};
use crate::number::{number, percent, time};
use crate::page::{Curve, Line, LineChart, Page, Panel, Section, Table, spans_decades};
use crate::rows::{MetricsRow, ScalarRow};

/// Fewer than a single run has: many runs share one page.
const BUCKETS: usize = 300;

/// What every page of this crate has near its start.
const MARK: &str = "<meta name=\"generator\" content=\"candle-grad-clip-log\"";

/// One run, as the comparison shows it.
struct Run {
    name: String,
    has_page: bool,
    last: MetricsRow,
    clipped: u64,
    skipped: u64,
    steps: u64,
    loss: Curve,
    total_norm: Curve,
    /// By name.
    scalars: BTreeMap<String, Curve>,
}

/// Writes `index.html` in a folder whose sub-folders hold runs: their curves over each other, a
/// table, and links to their pages. Call it after the runs, or now and then.
///
/// # Errors
/// [`Error::NotOurs`] if there is an `index.html` of another origin, which stays, or a CSV file with
/// other contents; [`Error::Io`].
pub fn compare_runs(folder: impl AsRef<Path>) -> Result<()> {
    let folder = folder.as_ref();
    let sections = runs_sections(folder)?;
    let path = folder.join(PAGE);
    if path.exists() && !is_ours(&path).map_err(Error::io("read", &path))? {
        return Err(Error::NotOurs {
            path,
            what: "it is a page of another origin".into(),
        });
    }
    let page = Page {
        title: format!("Training runs in {}", folder::name(folder)),
        sections,
        ..Page::default()
    };
    page.write(&path).map_err(Error::io("write", &path))
}

/// The sections of the page of [`compare_runs`], for a page of your own in the same folder.
///
/// # Errors
/// [`Error::NotOurs`] if a CSV file has other contents; [`Error::Io`].
pub fn runs_sections(folder: impl AsRef<Path>) -> Result<Vec<Section>> {
    let runs = read_runs(folder.as_ref())?;
    if runs.is_empty() {
        let none = format!("No sub-folder has a {METRICS} with a step yet.");
        return Ok(vec![Section::Text {
            text: none,
            mark: crate::page::Mark::None,
        }]);
    }
    let mut panels = Vec::new();
    add_panel(&mut panels, "train loss", &runs, |run| Some(&run.loss));
    let names: Vec<&String> = runs.iter().flat_map(|run| run.scalars.keys()).collect();
    let (mut losses, mut others): (Vec<&String>, Vec<_>) = names
        .into_iter()
        .partition(|name| name.starts_with("loss/"));
    losses.sort();
    others.sort();
    losses.dedup();
    others.dedup();
    for name in losses {
        let label = format!("{} loss", &name["loss/".len()..]);
        add_panel(&mut panels, &label, &runs, |run| run.scalars.get(name));
    }
    let norm = "norm before clipping";
    add_panel(&mut panels, norm, &runs, |run| Some(&run.total_norm));
    for name in others {
        add_panel(&mut panels, name, &runs, |run| run.scalars.get(name));
    }
    let link = |run: &Run| (run.name.clone(), format!("{}/{PAGE}", run.name));
    let with_page = runs.iter().filter(|run| run.has_page);
    Ok(vec![
        Section::Heading {
            text: "The runs over each other".into(),
        },
        Section::LineChart(LineChart {
            x_label: "step".into(),
            panels,
            ..LineChart::default()
        }),
        Section::Table(table(&runs)),
        Section::Heading {
            text: "The page of each run".into(),
        },
        Section::Links {
            links: with_page.map(link).collect(),
        },
    ])
}

/// A panel with a line for each run that has the curve; none if no run has it.
fn add_panel<'a>(
    panels: &mut Vec<Panel>,
    label: &str,
    runs: &'a [Run],
    curve: impl Fn(&'a Run) -> Option<&'a Curve>,
) {
    let mut lines = Vec::new();
    for (style, run) in runs.iter().enumerate() {
        if let Some(curve) = curve(run).filter(|curve| !curve.is_empty()) {
            let points = curve.points();
            lines.push(Line {
                name: run.name.clone(),
                markers: points.len() <= 50,
                points,
                style,
                ..Line::default()
            });
        }
    }
    if !lines.is_empty() {
        panels.push(Panel {
            y_label: label.to_owned(),
            y_log: spans_decades(&lines),
            lines,
            ..Panel::default()
        });
    }
}

fn table(runs: &[Run]) -> Table {
    let row = |run: &Run| {
        let test = run.scalars.get("loss/test");
        let lowest = test.map(Curve::points).and_then(|points| {
            let values = points.into_iter().map(|point| point.1);
            values.filter(|loss| loss.is_finite()).reduce(f64::min)
        });
        let of_steps = |count: u64| percent(count as f64 / run.steps as f64);
        vec![
            run.name.clone(),
            run.last.step.to_string(),
            run.loss
                .last()
                .map_or_else(String::new, |(_, loss)| number(loss)),
            lowest.map_or_else(String::new, number),
            of_steps(run.clipped),
            run.skipped.to_string(),
            time(run.last.seconds),
        ]
    };
    let columns = [
        "run",
        "last step",
        "last train loss",
        "lowest test loss",
        "clipped",
        "skipped steps",
        "time",
    ];
    let mut columns = columns.map(str::to_owned).to_vec();
    let mut rows: Vec<Vec<String>> = runs.iter().map(row).collect();
    // For example, no run has a test loss.
    for column in (0..columns.len()).rev() {
        if rows.iter().all(|row| row[column].is_empty()) {
            columns.remove(column);
            for row in &mut rows {
                row.remove(column);
            }
        }
    }
    Table {
        title: "The runs".into(),
        columns,
        rows,
    }
}

/// The runs of the sub-folders that have a step, by name.
fn read_runs(folder: &Path) -> Result<Vec<Run>> {
    let failure = || Error::io("read", folder);
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder).map_err(failure())? {
        let path = entry.map_err(failure())?.path();
        if path.join(METRICS).is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    let mut runs = Vec::new();
    for path in paths {
        runs.extend(read_run(&path)?);
    }
    Ok(runs)
}

/// `None` if there is no step yet.
fn read_run(folder: &Path) -> Result<Option<Run>> {
    let name = folder.file_name().unwrap_or(folder.as_os_str());
    let mut run = Run {
        name: name.to_string_lossy().into_owned(),
        has_page: folder.join(PAGE).is_file(),
        last: MetricsRow::default(),
        clipped: 0,
        skipped: 0,
        steps: 0,
        loss: Curve::with_buckets(BUCKETS),
        total_norm: Curve::with_buckets(BUCKETS),
        scalars: BTreeMap::new(),
    };
    csv_file::for_each(&folder.join(METRICS), |row: MetricsRow| {
        let x = row.step as f64;
        if let Some(loss) = row.loss {
            run.loss.push(x, loss);
        }
        run.total_norm.push(x, row.total_norm);
        run.steps += 1;
        run.clipped += u64::from(row.was_clipped);
        run.skipped += u64::from(row.skipped);
        run.last = row;
    })?;
    let scalars = folder.join(SCALARS);
    if scalars.is_file() {
        csv_file::for_each(&scalars, |row: ScalarRow| {
            let new = || Curve::with_buckets(BUCKETS);
            let curve = run.scalars.entry(row.name).or_insert_with(new);
            curve.push(row.step as f64, row.value);
        })?;
    }
    Ok((run.steps > 0).then_some(run))
}

fn is_ours(page: &Path) -> std::io::Result<bool> {
    let mut start = Vec::new();
    File::open(page)?.take(4096).read_to_end(&mut start)?;
    Ok(String::from_utf8_lossy(&start).contains(MARK))
}
