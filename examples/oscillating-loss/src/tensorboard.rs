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

use anyhow::Context;
use prost::Message;

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
const HOST: &str = ".oscillating-loss.";

/// Whether a file of this name was written by this program.
#[must_use]
pub fn is_ours(name: &str) -> bool {
    name.starts_with(PREFIX) && name.contains(HOST)
}

/// Writes scalars and histograms to its own event file.
#[derive(Debug)]
pub struct EventWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// Starts a new file `events.out.tfevents.*` in `dir`, which is made if it does not exist.
    ///
    /// # Errors
    /// If the file can't be made or written to.
    pub fn create(dir: &Path) -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        fs::create_dir_all(dir).with_context(|| format!("cannot make `{}`", dir.display()))?;
        let (seconds, process) = (seconds_since_1970(), std::process::id());
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{seconds:010.0}{HOST}{process}.{count}");
        let path = dir.join(name);
        let file = File::create_new(&path)
            .with_context(|| format!("cannot make event file `{}`", path.display()))?;
        let mut writer = Self::on(file, path);
        writer.event(0, Some("brain.Event:2".into()), None)?;
        writer.flush()?;
        Ok(writer)
    }

    pub(crate) fn on(file: File, path: PathBuf) -> Self {
        Self {
            file: BufWriter::new(file),
            path,
        }
    }

    /// Adds one point of the curve `tag`; a point that is not finite is kept as it is.
    ///
    /// # Errors
    /// If the file can't be written to, or `step` is beyond `i64::MAX`.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f32) -> anyhow::Result<()> {
        let value = Value {
            tag: tag.into(),
            scalar: Some(value),
            histo: None,
        };
        self.value(step, value)
    }

    /// Adds a histogram under `tag`.
    ///
    /// # Errors
    /// As [`scalar`](Self::scalar).
    pub fn histogram(&mut self, tag: &str, step: u64, value: Histogram) -> anyhow::Result<()> {
        let value = Value {
            tag: tag.into(),
            scalar: None,
            histo: Some(value),
        };
        self.value(step, value)
    }

    fn value(&mut self, step: u64, value: Value) -> anyhow::Result<()> {
        let step = i64::try_from(step).context("a step of an event file is at most i64::MAX")?;
        self.event(step, None, Some(Summary { value: vec![value] }))
    }

    /// Hands what is buffered to the system, so that a running `TensorBoard` shows it.
    ///
    /// # Errors
    /// If the file can't be written to.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        self.file.flush().with_context(|| self.failure())
    }

    fn event(
        &mut self,
        step: i64,
        file_version: Option<String>,
        summary: Option<Summary>,
    ) -> anyhow::Result<()> {
        let event = Event {
            wall_time: seconds_since_1970(),
            step,
            file_version,
            summary,
        };
        self.file
            .write_all(&record(&event.encode_to_vec()))
            .with_context(|| self.failure())
    }

    fn failure(&self) -> String {
        format!("cannot write event file `{}`", self.path.display())
    }
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

    /// Every record of the only file in `dir`, its checksums compared.
    fn read_back(dir: &Path) -> Vec<Event> {
        let files: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|file| file.unwrap().path())
            .collect();
        assert_eq!(files.len(), 1, "{files:?}");
        let name = files[0].file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("events.out.tfevents."), "{name}");
        let bytes = fs::read(&files[0]).unwrap();
        let mut rest = bytes.as_slice();
        let mut events = Vec::new();
        while !rest.is_empty() {
            let (length, after) = checked(rest, 8);
            let length = u64::from_le_bytes(length.try_into().unwrap());
            let (payload, after) = checked(after, usize::try_from(length).unwrap());
            events.push(Event::decode(payload).unwrap());
            rest = after;
        }
        events
    }

    fn checked(bytes: &[u8], length: usize) -> (&[u8], &[u8]) {
        let (content, after) = bytes.split_at(length);
        let (crc, after) = after.split_at(4);
        assert_eq!(masked_crc(content).to_le_bytes(), crc);
        (content, after)
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
            writer.scalar("loss/train", step, value).unwrap();
        }
        writer.scalar("grad/clip_coef", 4, f32::NAN).unwrap();
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
        assert!(writer.scalar("loss/train", u64::MAX, 1.0).is_err());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let message = EventWriter::create(&file.join("run"))
            .unwrap_err()
            .to_string();
        assert!(message.contains("file"), "{message}");
    }
}
