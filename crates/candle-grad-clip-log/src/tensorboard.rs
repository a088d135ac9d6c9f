//! Event files that `TensorBoard` opens.
//!
//! A file is a row of records: the payload's length as a little-endian `u64`, the masked CRC32C of
//! these eight bytes, the payload, its masked CRC32C. A payload is an `Event` of `TensorFlow`'s
//! `event.proto`, of which the messages below are the fields that scalars and histograms need.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::error::{Error, Result};
use crate::histogram::Histogram;

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    /// Present even when it is 0: a plain field would be left out of the payload then.
    #[prost(float, optional, tag = "2")]
    scalar: Option<f32>,
    #[prost(message, optional, tag = "5")]
    histo: Option<Histogram>,
}

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

/// Removes the events after `step` from our files in `dir`, and half a record at the end. A file
/// without any event left goes.
pub(crate) fn cut(dir: &Path, step: u64) -> Result<()> {
    for path in files(dir, is_ours)? {
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        let mut kept = Vec::with_capacity(bytes.len());
        let mut has_values = false;
        let mut rest = bytes.as_slice();
        while let Some((event, length)) = first_event(rest) {
            let (record, after) = rest.split_at(length);
            if u64::try_from(event.step).is_ok_and(|of_event| of_event <= step) {
                kept.extend_from_slice(record);
                has_values |= event.summary.is_some();
            }
            rest = after;
        }
        if !has_values {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        } else if kept.len() < bytes.len() {
            // A kill leaves the old file or the new one.
            let beside = dir.join(".events.cut.tmp");
            let written = fs::write(&beside, &kept).and_then(|()| fs::rename(&beside, &path));
            written.map_err(Error::io("cut", &path))?;
        }
    }
    Ok(())
}

/// The files in `dir` whose name `is_wanted`, in the order of their names.
pub(crate) fn files(dir: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let failure = || Error::io("read", dir);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(failure())? {
        let entry = entry.map_err(failure())?;
        if is_wanted(&entry.file_name().to_string_lossy()) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// The first event, and how long its record is. `None` for half a record or a wrong checksum.
fn first_event(bytes: &[u8]) -> Option<(Event, usize)> {
    let (length, after) = checked(bytes, 8)?;
    let length = usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()?;
    let (payload, _) = checked(after, length)?;
    Some((Event::decode(payload).ok()?, length + 16))
}

/// The first bytes and what follows their checksum, if that is right.
fn checked(bytes: &[u8], length: usize) -> Option<(&[u8], &[u8])> {
    let (content, after) = bytes.split_at_checked(length)?;
    let (crc, after) = after.split_at_checked(4)?;
    (masked_crc(content).to_le_bytes() == crc).then_some((content, after))
}

fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(payload);
    record.extend(masked_crc(payload).to_le_bytes());
    record
}

/// CRC32C, rotated and shifted so that a checksum of data that holds checksums stays a good one.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

fn seconds_since_1970() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;

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
        let of_file = |path: &PathBuf| events(&fs::read(path).unwrap());
        let files = files(dir, is_ours).unwrap();
        files.iter().flat_map(of_file).flat_map(of_event).collect()
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

    /// Every record of the only file in `dir`, its checksums compared.
    fn read_back(dir: &Path) -> Vec<Event> {
        let files = files(dir, is_event_file).unwrap();
        assert_eq!(files.len(), 1, "{files:?}");
        events(&fs::read(&files[0]).unwrap())
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

    /// Written by the Python package tensorboard 2.21.0: `RecordWriter` with `Event(wall_time=1.5,
    /// step=7, summary=...)` and `Value(tag="loss", simple_value=0.25)`.
    #[test]
    fn a_record_has_the_bytes_that_tensorboard_writes() {
        let value = Value {
            tag: "loss".into(),
            scalar: Some(0.25),
            histo: None,
        };
        let event = Event {
            wall_time: 1.5,
            step: 7,
            file_version: None,
            summary: Some(Summary { value: vec![value] }),
        };
        let expected = [
            &[0x1a, 0, 0, 0, 0, 0, 0, 0][..],
            &[0x12, 0x9b, 0xd8, 0x2d],
            b"\x09\0\0\0\0\0\0\xf8\x3f\x10\x07\x2a\x0d\x0a\x0b\x0a\x04loss\x15\0\0\x80\x3e",
            &[0xc9, 0xd0, 0x7b, 0x8d],
        ];
        assert_eq!(record(&event.encode_to_vec()), expected.concat());
    }

    /// Written by the Python package tensorboard 2.21.0: `Value(tag="g",
    /// histo=HistogramProto(min=-1, max=2, num=3, sum=1, sum_squares=5, bucket_limit=[0, 4],
    /// bucket=[1, 2]))`.
    #[test]
    fn a_histogram_has_the_bytes_that_tensorboard_writes() {
        let histogram = Histogram {
            min: -1.0,
            max: 2.0,
            num: 3.0,
            sum: 1.0,
            sum_squares: 5.0,
            bucket_limit: vec![0.0, 4.0],
            bucket: vec![1.0, 2.0],
        };
        let value = Value {
            tag: "g".into(),
            scalar: None,
            histo: Some(histogram),
        };
        let expected = [
            &b"\x0a\x01g\x2aQ"[..],
            b"\x09\0\0\0\0\0\0\xf0\xbf\x11\0\0\0\0\0\0\0\x40\x19\0\0\0\0\0\0\x08\x40",
            b"\x21\0\0\0\0\0\0\xf0\x3f\x29\0\0\0\0\0\0\x14\x40",
            b"\x32\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\x40",
            b"\x3a\x10\0\0\0\0\0\0\xf0\x3f\0\0\0\0\0\0\0\x40",
        ];
        assert_eq!(value.encode_to_vec(), expected.concat());
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

    /// Three steps; then the file is cut after every byte of the last two records.
    #[test]
    fn a_torn_file_is_cut_at_whole_records() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path()).unwrap();
        let mut ends = Vec::new();
        for step in [1, 2, 3] {
            writer.scalars(step, [("a", 0.5), ("b", 1.5)]).unwrap();
            writer.flush().unwrap();
            ends.push(fs::metadata(&writer.path).unwrap().len() as usize);
        }
        let whole = fs::read(&writer.path).unwrap();
        for end in ends[0]..=ends[2] {
            fs::write(&writer.path, &whole[..end]).unwrap();
            cut(dir.path(), u64::MAX).unwrap();
            let kept = fs::read(&writer.path).unwrap();
            let whole_records = ends.iter().rfind(|at| **at <= end).unwrap();
            assert_eq!(kept, whole[..*whole_records], "{end}");
        }
    }

    /// Events of two kinds are written out of order: those after the step go, wherever they are.
    #[test]
    fn events_after_the_step_go_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path()).unwrap();
        for step in [1, 4, 2, 3] {
            writer.scalars(step, [("a", 0.0)]).unwrap();
        }
        writer.flush().unwrap();
        let foreign = dir.path().join("events.out.tfevents.1.host");
        fs::write(&foreign, "foreign").unwrap();
        cut(dir.path(), 2).unwrap();
        let steps: Vec<_> = scalars(dir.path()).iter().map(|point| point.0).collect();
        assert_eq!(steps, [1, 2]);
        cut(dir.path(), 0).unwrap();
        assert_eq!(files(dir.path(), is_event_file).unwrap(), [foreign]);
    }
}
