//! The safetensors format: eight bytes with the header's length, the header in JSON, the numbers (little-endian).
//!
//! Not by the crate `safetensors` (0.8): it takes the last of two entries with one name, adds up sizes unchecked, which a
//! hostile file makes overflow, and wants the whole file in memory.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::path::Path;

use candle_core::{DType, Var};
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::document::{FORMAT, VERSION};
use super::{Checked, Fault, listed};
use crate::param_state::{arrays_mut, stride};
use crate::tensors::wide_dtype;

/// As the crate `safetensors` has it, so that others can read what we write.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The bytes of the header's length.
const PREFIX_BYTES: u64 = 8;
/// Bytes of a buffer between us and the file.
pub(super) const BUFFER_BYTES: usize = 1 << 20;
/// The key that is no tensor.
const METADATA: &str = "__metadata__";

/// The entries of a file's metadata that we know; there may be others.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Metadata {
    pub(super) format: Option<String>,
    pub(super) format_version: Option<String>,
    pub(super) crate_version: Option<String>,
    /// The document.
    pub(super) checkpoint: Option<String>,
    /// The document's checksum: CRC-32, as eight hexadecimal digits.
    pub(super) checkpoint_crc32: Option<String>,
    /// The tensors' checksums, of each its name and its bytes, in the order of their names.
    pub(super) tensors_crc32: Option<String>,
}

/// A tensor in the header.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TensorInfo {
    dtype: String,
    shape: Vec<usize>,
    /// Where it begins and ends, from the end of the header.
    pub(super) data_offsets: (u64, u64),
}

impl TensorInfo {
    /// An array of `var`, at `offset`.
    pub(super) fn new(var: &Var, offset: u64) -> Self {
        let bytes = var.elem_count() * wide_dtype(var.dtype()).size_in_bytes();
        Self {
            dtype: dtype_name(var).to_string(),
            shape: var.dims().to_vec(),
            data_offsets: (offset, offset.saturating_add(bytes as u64)),
        }
    }

    /// A list of f64, at `offset`.
    pub(super) fn list(len: usize, offset: u64) -> Self {
        let bytes = len as u64 * size_of::<f64>() as u64;
        Self {
            dtype: "F64".to_string(),
            shape: vec![len],
            data_offsets: (offset, offset.saturating_add(bytes)),
        }
    }

    /// The bytes that dtype and shape say, if it is one of our dtypes.
    fn bytes(&self) -> Option<u64> {
        let size = match self.dtype.as_str() {
            "F32" => 4,
            "F64" => 8,
            _ => return None,
        };
        let dims = self.shape.iter().map(|dim| *dim as u64);
        dims.into_iter().try_fold(size, u64::checked_mul)
    }
}

fn dtype_name(var: &Var) -> &'static str {
    match wide_dtype(var.dtype()) {
        DType::F64 => "F64",
        _ => "F32",
    }
}

/// Everything in front of the numbers, with the tensors' checksums. Whatever these are, it has the same length.
pub(super) fn header_bytes(
    document: &str,
    tensors: &[(String, TensorInfo)],
    sums: &[u32],
) -> Checked<Vec<u8>> {
    struct Entries<'a>(Metadata, &'a [(String, TensorInfo)]);
    impl Serialize for Entries<'_> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut map = serializer.serialize_map(Some(1 + self.1.len()))?;
            map.serialize_entry(METADATA, &self.0)?;
            for (name, info) in self.1 {
                map.serialize_entry(name, info)?;
            }
            map.end()
        }
    }
    let mut by_name: Vec<(&str, u32)> = tensors
        .iter()
        .map(|(name, _)| name.as_str())
        .zip(sums.iter().copied())
        .collect();
    by_name.sort_unstable();
    let metadata = Metadata {
        format: Some(FORMAT.to_string()),
        format_version: Some(VERSION.to_string()),
        crate_version: Some(env!("CARGO_PKG_VERSION").to_string()),
        checkpoint: Some(document.to_string()),
        checkpoint_crc32: Some(hex(crc32fast::hash(document.as_bytes()))),
        tensors_crc32: Some(by_name.into_iter().map(|(_, sum)| hex(sum)).collect()),
    };
    let mut bytes = vec![0; PREFIX_BYTES as usize];
    serde_json::to_writer(&mut bytes, &Entries(metadata, tensors))
        .map_err(|error| Fault::Invalid(error.to_string()))?;
    // The numbers begin at a multiple of eight.
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    let len = bytes.len() as u64 - PREFIX_BYTES;
    if len > MAX_HEADER_BYTES {
        return Err(Fault::Invalid(format!(
            "names and shapes of {} tensors take {len} bytes, more than the {MAX_HEADER_BYTES} \
             that the format allows",
            tensors.len()
        )));
    }
    bytes[..PREFIX_BYTES as usize].copy_from_slice(&len.to_le_bytes());
    Ok(bytes)
}

/// A checksum as it is written.
pub(super) fn hex(sum: u32) -> String {
    format!("{sum:08x}")
}

/// The numbers that an array may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Range {
    /// All: they are checked elsewhere, or were saved as they were.
    Any,
    Finite,
    /// Finite, and 0 or above.
    NotNegative,
    /// NaN, or 0 or above.
    NotBelowZero,
}

impl Range {
    /// Of a Var's array, by its name.
    pub(super) fn of(key: &str, non_finite: bool) -> Self {
        match (key.ends_with("second_moment"), non_finite) {
            (false, false) => Self::Finite,
            (false, true) => Self::Any,
            (true, false) => Self::NotNegative,
            (true, true) => Self::NotBelowZero,
        }
    }

    fn has(self, x: f64) -> bool {
        match self {
            Self::Any => true,
            Self::Finite => x.is_finite(),
            Self::NotNegative => x.is_finite() && x >= 0.0,
            Self::NotBelowZero => x >= 0.0 || x.is_nan(),
        }
    }

    /// The first number that is outside.
    fn first_outside<W: Copy + Into<f64>>(self, numbers: &[W]) -> Option<f64> {
        // Without a way out, which makes the loop fast.
        let all = numbers
            .iter()
            .fold(true, |all, x| all & self.has((*x).into()));
        let mut numbers = numbers.iter().map(|x| (*x).into());
        if all {
            return None;
        }
        numbers.find(|x| !self.has(*x))
    }
}

/// Writes arrays one after the other, and keeps a checksum of each.
pub(super) struct Writer<'a, W: Write> {
    pub(super) out: &'a mut W,
    /// The names of the arrays to come.
    pub(super) keys: std::slice::Iter<'a, (String, TensorInfo)>,
    /// Of those that were written.
    pub(super) sums: Vec<u32>,
    /// Whether numbers may be NaN or infinite.
    pub(super) non_finite: bool,
}

/// Numbers that are read or written at a time: they stay in a cache.
const CHUNK: usize = BUFFER_BYTES / 8;

impl<W: Write> Writer<'_, W> {
    /// The next array, as little-endian.
    pub(super) fn write<N: bytemuck::NoUninit + Into<f64>>(
        &mut self,
        numbers: &[N],
    ) -> Checked<()> {
        let key = self.keys.next().map_or("", |(key, _)| key);
        let range = Range::of(key, self.non_finite);
        let mut sum = crc32fast::Hasher::new();
        sum.update(key.as_bytes());
        for numbers in numbers.chunks(CHUNK) {
            if let Some(bad) = range.first_outside(numbers) {
                return Err(Fault::Invalid(format!(
                    "nothing was saved, since the state is ruined: {key:?} (Var and array) has {bad}; go back to an \
                     earlier checkpoint, or take save_non_finite if NaN and infinity are meant"
                )));
            }
            if cfg!(target_endian = "little") {
                let bytes = bytemuck::cast_slice(numbers);
                sum.update(bytes);
                self.out.write_all(bytes)?;
                continue;
            }
            for number in numbers {
                let mut bytes = bytemuck::bytes_of(number).to_vec();
                bytes.reverse();
                sum.update(&bytes);
                self.out.write_all(&bytes)?;
            }
        }
        self.sums.push(sum.finalize());
        Ok(())
    }
}

/// The checked header of a file.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: Metadata,
    tensors: HashMap<String, TensorInfo>,
}

/// A tensor that was asked for.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) key: String,
    /// Where it begins, from the end of the header.
    offset: u64,
    pub(super) len: usize,
    /// Its checksum.
    sum: u32,
}

/// The numbers of a file.
pub(super) struct Arrays {
    reader: BufReader<File>,
    /// Where the reader stands, from the end of the header.
    position: u64,
}

impl Header {
    /// Reads a header; the tensors then cover the rest of the file, without gaps or overlaps.
    pub(super) fn read(path: &Path) -> Checked<(Self, Arrays)> {
        let file_type = fs::metadata(path)?;
        if !file_type.is_file() {
            return Err(Fault::Invalid(
                "not a regular file, expected one that save has written".to_string(),
            ));
        }
        let file = File::open(path)?;
        let file_bytes = file.metadata()?.len();
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, file);
        let cut_short = || {
            Fault::Invalid(format!(
                "{file_bytes} bytes are no safetensors file, or not all of one"
            ))
        };
        let rest_bytes = file_bytes.checked_sub(PREFIX_BYTES).ok_or_else(cut_short)?;
        let mut prefix = [0; PREFIX_BYTES as usize];
        reader.read_exact(&mut prefix)?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(Fault::Invalid(format!(
                "its header would have {header_bytes} bytes, expected {MAX_HEADER_BYTES} at most: \
                 is it a safetensors file?"
            )));
        }
        let data_bytes = rest_bytes.checked_sub(header_bytes).ok_or_else(cut_short)?;
        let mut json = Vec::new();
        reader.by_ref().take(header_bytes).read_to_end(&mut json)?;
        let header: Self = serde_json::from_slice(&json)
            .map_err(|error| Fault::Invalid(format!("its header can't be read: {error}")))?;
        header.check_layout(data_bytes)?;
        let arrays = Arrays {
            reader,
            position: 0,
        };
        Ok((header, arrays))
    }

    /// One tensor behind the other, each as long as its shape says, to the end of the file.
    fn check_layout(&self, data_bytes: u64) -> Checked<()> {
        let mut tensors: Vec<(&String, &TensorInfo)> = self.tensors.iter().collect();
        tensors.sort_by_key(|(name, info)| (info.data_offsets, name.as_str()));
        let mut end = 0;
        for (name, info) in tensors {
            let (from, to) = info.data_offsets;
            let bytes = info.bytes().and_then(|bytes| from.checked_add(bytes));
            if from != end || bytes != Some(to) {
                return Err(Fault::Invalid(format!(
                    "tensor {name:?}, {} {:?}, lies at {from}..{to} of the data, expected it at \
                     {end} and as long as its shape says, in F32 or F64",
                    info.dtype, info.shape
                )));
            }
            end = to;
        }
        if end != data_bytes {
            return Err(Fault::Invalid(format!(
                "its tensors take {end} bytes, but {data_bytes} follow the header: the file was \
                 cut or something was appended"
            )));
        }
        Ok(())
    }

    /// The array of `var` by this name.
    pub(super) fn take(&mut self, name: &str, var: &Var) -> Checked<Place> {
        let Some(info) = self.tensors.remove(name) else {
            return Err(Fault::Invalid(format!("it has no tensor {name:?}")));
        };
        let expected = (dtype_name(var), var.dims());
        if (info.dtype.as_str(), &*info.shape) != expected {
            return Err(Fault::Invalid(format!(
                "tensor {name:?} is {} {:?}, expected {} {:?}",
                info.dtype, info.shape, expected.0, expected.1
            )));
        }
        Ok(Place {
            key: name.to_string(),
            offset: info.data_offsets.0,
            len: var.elem_count(),
            sum: 0,
        })
    }

    /// The list by this name, if there is one.
    pub(super) fn take_list(&mut self, name: &str) -> Checked<Option<Place>> {
        let Some(info) = self.tensors.remove(name) else {
            return Ok(None);
        };
        let ("F64", &[len]) = (info.dtype.as_str(), &*info.shape) else {
            return Err(Fault::Invalid(format!(
                "tensor {name:?} is {} {:?}, expected a list of F64",
                info.dtype, info.shape
            )));
        };
        Ok(Some(Place {
            key: name.to_string(),
            offset: info.data_offsets.0,
            len,
            sum: 0,
        }))
    }

    /// Tells the places, which are all that the file has, their checksums.
    pub(super) fn fill_sums<'a>(&self, places: impl Iterator<Item = &'a mut Place>) -> Checked<()> {
        let mut places: Vec<&mut Place> = places.collect();
        places.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        let text = self.metadata.tensors_crc32.as_deref().unwrap_or_default();
        let sums = text.as_bytes().chunks(8);
        let invalid = || {
            Fault::Invalid(format!(
                "its metadata has no checksums of its {} tensors: \"tensors_crc32\" has {} bytes, expected eight \
                 hexadecimal digits for each",
                places.len(),
                text.len()
            ))
        };
        if text.len() != 8 * places.len() {
            return Err(invalid());
        }
        let mut parsed = Vec::with_capacity(places.len());
        for sum in sums {
            let sum = std::str::from_utf8(sum).ok();
            let sum = sum.and_then(|sum| u32::from_str_radix(sum, 16).ok());
            parsed.push(sum.ok_or_else(invalid)?);
        }
        for (place, sum) in places.into_iter().zip(parsed) {
            place.sum = sum;
        }
        Ok(())
    }

    /// All tensors were taken.
    pub(super) fn expect_empty(&self) -> Checked<()> {
        if self.tensors.is_empty() {
            return Ok(());
        }
        let mut names: Vec<String> = self.tensors.keys().map(|n| format!("{n:?}")).collect();
        names.sort();
        Err(Fault::Invalid(format!(
            "it has tensors that belong to no Var's state: {}",
            listed(&names)
        )))
    }
}

impl Arrays {
    /// Arrays of one length, as [`State::Host`](crate::optim::state::State) holds them, once their checksums are found right and their
    /// numbers in range.
    pub(super) fn read<W: bytemuck::Pod + Into<f64>>(
        &mut self,
        places: &[Place],
        len: usize,
        non_finite: bool,
    ) -> Checked<Vec<W>> {
        let mut numbers = vec![W::zeroed(); places.len() * stride(len)];
        for (place, array) in places.iter().zip(arrays_mut(&mut numbers, len)) {
            let range = Range::of(&place.key, non_finite);
            self.read_array(place, array, range)?;
        }
        Ok(numbers)
    }

    /// A list whose numbers the caller checks.
    pub(super) fn read_list(&mut self, place: &Place) -> Checked<Vec<f64>> {
        let mut numbers = vec![0.0; place.len];
        self.read_array(place, &mut numbers, Range::Any)?;
        Ok(numbers)
    }

    fn read_array<W: bytemuck::Pod + Into<f64>>(
        &mut self,
        place: &Place,
        array: &mut [W],
        range: Range,
    ) -> Checked<()> {
        self.reader
            .seek_relative(place.offset.wrapping_sub(self.position).cast_signed())?;
        self.position = place.offset + size_of_val(array) as u64;
        let mut sum = crc32fast::Hasher::new();
        sum.update(place.key.as_bytes());
        let mut outside = None;
        for numbers in array.chunks_mut(CHUNK) {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(numbers);
            self.reader.read_exact(bytes)?;
            sum.update(bytes);
            if cfg!(target_endian = "big") {
                let numbers = bytes.chunks_exact_mut(size_of::<W>());
                numbers.for_each(<[u8]>::reverse);
            }
            outside = outside.or_else(|| range.first_outside(numbers));
        }
        let (key, sum) = (&place.key, sum.finalize());
        if sum != place.sum {
            return Err(Fault::Invalid(format!(
                "tensor {key:?} is damaged: its checksum is {}, expected {}",
                hex(sum),
                hex(place.sum)
            )));
        }
        outside.map_or(Ok(()), |bad| {
            let expected = match range {
                Range::NotNegative => "finite numbers, 0 or above",
                _ => "finite numbers",
            };
            Err(Fault::Invalid(format!(
                "tensor {key:?} has {bad}, expected {expected}"
            )))
        })
    }
}

/// By hand, since a map would take the last of two tensors with one name.
impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut metadata = None;
                let mut tensors = HashMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    let is_new = if name == METADATA {
                        metadata.replace(map.next_value()?).is_none()
                    } else {
                        tensors.insert(name.clone(), map.next_value()?).is_none()
                    };
                    if !is_new {
                        return Err(serde::de::Error::custom(format!("{name:?} comes twice")));
                    }
                }
                Ok(Header {
                    metadata: metadata.unwrap_or_default(),
                    tensors,
                })
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
