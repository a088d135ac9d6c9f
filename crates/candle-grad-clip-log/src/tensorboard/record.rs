//! The records of an event file.
//!
//! A record is the payload's length as a little-endian `u64`, the masked CRC32C of these eight
//! bytes, the payload, its masked CRC32C. A payload is an `Event` of `TensorFlow`'s `event.proto`,
//! of which the messages below are the fields that scalars and histograms need.

use prost::Message;

use crate::histogram::Histogram;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub(super) wall_time: f64,
    #[prost(int64, tag = "2")]
    pub(super) step: i64,
    #[prost(string, optional, tag = "3")]
    pub(super) file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    pub(super) summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub(super) value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Value {
    #[prost(string, tag = "1")]
    pub(super) tag: String,
    /// Present even when it is 0: a plain field would be left out of the payload then.
    #[prost(float, optional, tag = "2")]
    pub(super) scalar: Option<f32>,
    #[prost(message, optional, tag = "5")]
    pub(super) histo: Option<Histogram>,
}

/// The first event, and how long its record is. `None` for half a record or a wrong checksum.
pub(super) fn first_event(bytes: &[u8]) -> Option<(Event, usize)> {
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

/// A whole record.
pub(super) fn record(payload: &[u8]) -> Vec<u8> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
