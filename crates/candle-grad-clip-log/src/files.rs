//! The files that a running log appends to. One that can't be written is given up with a warning,
//! and training goes on.

use std::path::{Path, PathBuf};

use crate::csv_file::CsvFile;
use crate::error::Result;
use crate::folder::{METRICS, PARAM_NORMS, SCALARS};
use crate::histogram::Histogram;
use crate::rows::{MetricsRow, ParamNormsRow, ScalarRow};
use crate::tensorboard::EventWriter;

/// A file that is opened for its first record, so that no file is left empty.
#[derive(Debug)]
enum Sink<T> {
    New,
    Open(T),
    /// It failed, and the warning is given.
    GivenUp,
}

impl<T> Sink<T> {
    fn write(
        &mut self,
        open: impl FnOnce() -> Result<T>,
        write: impl FnOnce(&mut T) -> Result<()>,
    ) -> Result<()> {
        if matches!(self, Self::New) {
            *self = Self::Open(open()?);
        }
        self.write_if_open(write)
    }

    fn write_if_open(&mut self, write: impl FnOnce(&mut T) -> Result<()>) -> Result<()> {
        match self {
            Self::Open(file) => write(file),
            Self::New | Self::GivenUp => Ok(()),
        }
    }
}

/// The files of one run.
#[derive(Debug)]
pub(crate) struct Files {
    folder: PathBuf,
    metrics: Sink<CsvFile>,
    scalars: Sink<CsvFile>,
    param_norms: Sink<CsvFile>,
    events: Sink<EventWriter>,
    failures: Failures,
}

/// What becomes of a failure to write.
#[derive(Debug, Default)]
struct Failures {
    strict: bool,
    /// Not shown yet.
    warnings: Vec<String>,
    /// Whether there was a warning of files that are tried again, such as the page.
    warned_of_page: bool,
}

impl Failures {
    /// Gives up `sink` after an error, unless the error is for the caller.
    fn settle<T>(&mut self, sink: &mut Sink<T>, outcome: Result<()>) -> Result<()> {
        let Err(error) = outcome else {
            return Ok(());
        };
        if self.strict {
            return Err(error);
        }
        *sink = Sink::GivenUp;
        self.warn(format!(
            "{}; training goes on without this file",
            error.with_cause()
        ));
        Ok(())
    }

    fn warn(&mut self, warning: String) {
        tracing::warn!("{warning}");
        self.warnings.push(warning);
    }
}

impl Files {
    pub(crate) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_path_buf(),
            metrics: Sink::New,
            scalars: Sink::New,
            param_norms: Sink::New,
            events: Sink::New,
            failures: Failures::default(),
        }
    }

    pub(crate) fn set_strict(&mut self, strict: bool) {
        self.failures.strict = strict;
    }

    pub(crate) fn is_strict(&self) -> bool {
        self.failures.strict
    }

    /// The warnings since the last call, for the terminal. `tracing` has them already.
    pub(crate) fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.failures.warnings)
    }

    pub(crate) fn warn(&mut self, warning: String) {
        self.failures.warn(warning);
    }

    pub(crate) fn metrics(&mut self, row: &MetricsRow) -> Result<()> {
        let open = || CsvFile::append::<MetricsRow>(&self.folder.join(METRICS));
        let outcome = self.metrics.write(open, |csv| csv.row(row));
        self.failures.settle(&mut self.metrics, outcome)
    }

    pub(crate) fn scalar(&mut self, row: &ScalarRow) -> Result<()> {
        let open = || CsvFile::append::<ScalarRow>(&self.folder.join(SCALARS));
        let outcome = self.scalars.write(open, |csv| csv.row(row));
        self.failures.settle(&mut self.scalars, outcome)
    }

    pub(crate) fn param_norms(&mut self, rows: &[ParamNormsRow]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let open = || CsvFile::append::<ParamNormsRow>(&self.folder.join(PARAM_NORMS));
        let append = |csv: &mut CsvFile| rows.iter().try_for_each(|row| csv.row(row));
        let outcome = self.param_norms.write(open, append);
        self.failures.settle(&mut self.param_norms, outcome)
    }

    /// Adds points to the curves of `TensorBoard`.
    pub(crate) fn points<'a>(
        &mut self,
        step: u64,
        points: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> Result<()> {
        self.event(|events| events.scalars(step, points))
    }

    pub(crate) fn histogram(&mut self, tag: &str, step: u64, value: Histogram) -> Result<()> {
        self.event(|events| events.histogram(tag, step, value))
    }

    fn event(&mut self, write: impl FnOnce(&mut EventWriter) -> Result<()>) -> Result<()> {
        let outcome = self
            .events
            .write(|| EventWriter::create(&self.folder), write);
        self.failures.settle(&mut self.events, outcome)
    }

    /// No event file is written from now on.
    pub(crate) fn end_events(&mut self) {
        self.events = Sink::GivenUp;
    }

    /// Hands all that is buffered to the system.
    pub(crate) fn flush(&mut self) -> Result<()> {
        for csv in [&mut self.metrics, &mut self.scalars, &mut self.param_norms] {
            let outcome = csv.write_if_open(CsvFile::flush);
            self.failures.settle(csv, outcome)?;
        }
        let outcome = self.events.write_if_open(EventWriter::flush);
        self.failures.settle(&mut self.events, outcome)
    }

    /// Warns once if the page or `run.json` could not be written. They are tried again.
    pub(crate) fn settle_page(&mut self, outcome: Result<()>) -> Result<()> {
        let Err(error) = outcome else {
            return Ok(());
        };
        if self.failures.strict {
            return Err(error);
        }
        if !std::mem::replace(&mut self.failures.warned_of_page, true) {
            self.warn(format!("{}; training goes on", error.with_cause()));
        }
        Ok(())
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::File;

    use super::*;

    /// Files on a device that takes nothing: every write fails as on a full disk.
    fn full(folder: &Path) -> Files {
        let path = Path::new("/dev/full");
        let open = || File::options().write(true).open(path).unwrap();
        Files {
            metrics: Sink::Open(CsvFile::on(open(), path)),
            events: Sink::Open(EventWriter::on(open(), path.into())),
            ..Files::new(folder)
        }
    }

    fn row(step: u64) -> MetricsRow {
        MetricsRow {
            step,
            ..MetricsRow::default()
        }
    }

    #[test]
    fn a_full_disk_is_one_warning_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = full(folder.path());
        files.metrics(&row(1)).unwrap();
        files.points(1, [("loss/train", 0.5)]).unwrap();
        assert!(files.take_warnings().is_empty(), "it is only buffered yet");
        files.flush().unwrap();
        let warnings = files.take_warnings();
        assert_eq!(warnings.len(), 2);
        for warning in warnings {
            assert!(warning.starts_with("cannot write `/dev/full`: No space left"));
        }
        files.metrics(&row(2)).unwrap();
        files.points(2, [("loss/train", 0.5)]).unwrap();
        files.scalar(&ScalarRow::new(2, "loss/test", 1.0)).unwrap();
        files.flush().unwrap();
        assert!(files.take_warnings().is_empty());
        // The other files go on.
        let scalars = crate::rows::read_scalars(folder.path().join(SCALARS)).unwrap();
        assert_eq!(scalars, [ScalarRow::new(2, "loss/test", 1.0)]);
    }

    #[test]
    fn a_full_disk_is_an_error_under_strict() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = full(folder.path());
        files.set_strict(true);
        files.metrics(&row(1)).unwrap();
        for _ in 0..2 {
            let error = files.flush().unwrap_err();
            assert_eq!(error.to_string(), "cannot write `/dev/full`");
        }
    }
}
