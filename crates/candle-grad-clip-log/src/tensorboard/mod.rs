//! Event files that `TensorBoard` opens: a row of records.

mod cut;
mod record;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

pub(crate) use cut::{UNFINISHED, cut};
use record::{Event, Summary, Value, record};

use crate::error::{Error, Result};
use crate::histogram::Histogram;

const PREFIX: &str = "events.out.tfevents.";

/// Where other programs have the host, so that their files are not taken for ours.
const HOST: &str = ".candle-grad-clip-log.";

/// Whether a file of this name is an event file, of any program.
pub(crate) fn is_event_file(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Whether a file of this name was written by this crate.
pub(crate) fn is_ours(name: &str) -> bool {
    is_event_file(name) && name.contains(HOST)
}

/// Writes scalars and histograms to its own event file.
#[derive(Debug)]
pub(crate) struct EventWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// Starts a new file `events.out.tfevents.*` in `dir`.
    pub(crate) fn create(dir: &Path) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let (seconds, process) = (seconds_since_1970(), std::process::id());
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{seconds:010.0}{HOST}{process}.{count}");
        let path = dir.join(name);
        let file = File::create_new(&path).map_err(Error::io("create", &path))?;
        let mut writer = Self::on(file, path);
        writer.event(0, Some("brain.Event:2".into()), None)?;
        writer.flush()?;
        Ok(writer)
    }

    pub(crate) fn on(file: File, path: PathBuf) -> Self {
        Self {
            file: BufWriter::with_capacity(64 << 10, file),
            path,
        }
    }

    /// Adds a point to each of these curves; a value that is not finite is kept as it is.
    pub(crate) fn scalars<'a>(
        &mut self,
        step: u64,
        points: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> Result<()> {
        let value = |(tag, value): (&str, f64)| Value {
            tag: tag.into(),
            scalar: Some(value as f32),
            histo: None,
        };
        self.values(step, points.into_iter().map(value).collect())
    }

    /// Adds a histogram under `tag`.
    pub(crate) fn histogram(&mut self, tag: &str, step: u64, value: Histogram) -> Result<()> {
        let value = Value {
            tag: tag.into(),
            scalar: None,
            histo: Some(value),
        };
        self.values(step, vec![value])
    }

    fn values(&mut self, step: u64, value: Vec<Value>) -> Result<()> {
        let step = i64::try_from(step).map_err(|_| Error::StepTooLarge(step))?;
        self.event(step, None, Some(Summary { value }))
    }

    /// Hands what is buffered to the system, so that a running `TensorBoard` shows it.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let flushed = self.file.flush();
        flushed.map_err(Error::io("write", &self.path))
    }

    fn event(
        &mut self,
        step: i64,
        file_version: Option<String>,
        summary: Option<Summary>,
    ) -> Result<()> {
        let event = Event {
            wall_time: seconds_since_1970(),
            step,
            file_version,
            summary,
        };
        let written = self.file.write_all(&record(&event.encode_to_vec()));
        written.map_err(Error::io("write", &self.path))
    }
}

fn seconds_since_1970() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use std::fs;

    use super::record::first_event;
    use super::*;
    use crate::listing::files;

    /// The histograms of the only file in `dir`: step, tag, histogram.
    pub(crate) fn histograms(dir: &Path) -> Vec<(i64, String, Histogram)> {
        let of_event = |event: Event| {
            let values = event.summary.unwrap_or_default().value.into_iter();
            values.filter_map(move |value| Some((event.step, value.tag, value.histo?)))
        };
        read_back(dir).into_iter().flat_map(of_event).collect()
    }

    /// Steps, tags and values of all scalars in `dir`, file by file.
    pub(crate) fn scalars(dir: &Path) -> Vec<(i64, String, f32)> {
        let of_event = |event: Event| {
            let values = event.summary.unwrap_or_default().value.into_iter();
            values.filter_map(move |value| Some((event.step, value.tag, value.scalar?)))
        };
        read_back(dir).into_iter().flat_map(of_event).collect()
    }

    /// Every event of our files in `dir`, in the order of the files' names.
    fn read_back(dir: &Path) -> Vec<Event> {
        let files = files(dir, is_ours).unwrap();
        let of_file = |path: &PathBuf| events(&fs::read(path).unwrap());
        files.iter().flat_map(of_file).collect()
    }

    fn events(bytes: &[u8]) -> Vec<Event> {
        let mut rest = bytes;
        let mut events = Vec::new();
        while !rest.is_empty() {
            let (event, length) = first_event(rest).unwrap();
            events.push(event);
            rest = &rest[length..];
        }
        events
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let before = seconds_since_1970();
        let mut writer = EventWriter::create(dir.path()).unwrap();
        let points = [
            (1, 0.0),
            (2, -2.5),
            (3, f32::INFINITY),
            (u64::MAX / 2, f32::MIN_POSITIVE),
        ];
        for (step, value) in points {
            let point = ("loss/train", f64::from(value));
            writer.scalars(step, [point]).unwrap();
        }
        writer.scalars(4, [("grad/clip_coef", f64::NAN)]).unwrap();
        writer.flush().unwrap();

        let events = read_back(dir.path());
        assert_eq!(events.len(), 6);
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        for ((step, value), event) in points.into_iter().zip(&events[1..]) {
            let expected = Value {
                tag: "loss/train".into(),
                scalar: Some(value),
                histo: None,
            };
            assert_eq!(
                event.summary,
                Some(Summary {
                    value: vec![expected]
                })
            );
            assert_eq!(event.step.unsigned_abs(), step);
        }
        let last = &events[5].summary.as_ref().unwrap().value[0];
        assert!(last.scalar.unwrap().is_nan());
        assert!(events.iter().all(|event| event.wall_time >= before));
    }

    #[test]
    fn two_writers_in_one_folder_have_files_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let _first = EventWriter::create(dir.path()).unwrap();
        let _second = EventWriter::create(dir.path()).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
    }

    #[test]
    fn a_step_that_the_format_cannot_hold_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path()).unwrap();
        assert!(writer.scalars(u64::MAX, [("loss/train", 1.0)]).is_err());
    }

    #[test]
    fn a_folder_that_is_missing_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let error = EventWriter::create(&dir.path().join("run")).unwrap_err();
        assert!(error.to_string().contains("run"), "{error}");
    }
}
