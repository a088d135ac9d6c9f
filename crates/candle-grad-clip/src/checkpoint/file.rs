//! The safetensors format: eight bytes with the header's length, the header in JSON, the numbers
//! (little-endian).
//!
//! The crate `safetensors` (0.8) checks sizes, offsets and gaps. This module does the rest. It
//! rejects two entries with the same name, of which the crate takes the last. It writes the header
//! in a fixed order, which the crate does not. It streams the arrays, for which the crate needs the
//! whole file in memory.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::Path;

use candle_core::{DType, Var};
use safetensors::tensor::{Dtype, Metadata as Layout, TensorInfo};
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::fault::{Checked, Fault, join_names};
use crate::tensors::wide_dtype;

/// The format's name.
pub(super) const FORMAT: &str = "candle-grad-clip optimizer";
/// A reader that does not know a version refuses it. Any new field needs a new version.
pub(super) const VERSION: &str = "1";
/// The limit of the crate `safetensors`, so that others can read our files.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Size of the header's length field.
const PREFIX_BYTES: u64 = 8;
/// Size of a file buffer.
pub(super) const BUFFER_BYTES: usize = 1 << 20;
/// The key of the metadata, which is not a tensor.
const METADATA: &str = "__metadata__";

/// The entries of a file's metadata that we know; there may be others.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Metadata {
    pub(super) format: Option<String>,
    pub(super) format_version: Option<String>,
    pub(super) crate_version: Option<String>,
    /// The checkpoint's header as JSON.
    pub(super) checkpoint: Option<String>,
    /// The checksum of that JSON: CRC-32, as eight hexadecimal digits.
    pub(super) checkpoint_crc32: Option<String>,
    /// The tensors' checksums (each of name and bytes), sorted by name.
    pub(super) tensors_crc32: Option<String>,
}

/// An array of `var`, at `offset` from the end of the header.
pub(super) fn array_info(var: &Var, offset: usize) -> TensorInfo {
    let bytes = var.elem_count() * wide_dtype(var.dtype()).size_in_bytes();
    TensorInfo {
        dtype: dtype_in_file(var),
        shape: var.dims().to_vec(),
        data_offsets: (offset, offset.saturating_add(bytes)),
    }
}

/// A list of f64, at `offset` from the end of the header.
pub(super) fn list_info(len: usize, offset: usize) -> TensorInfo {
    TensorInfo {
        dtype: Dtype::F64,
        shape: vec![len],
        data_offsets: (offset, offset.saturating_add(len * size_of::<f64>())),
    }
}

fn dtype_in_file(var: &Var) -> Dtype {
    match wide_dtype(var.dtype()) {
        DType::F64 => Dtype::F64,
        _ => Dtype::F32,
    }
}

/// The file's bytes before the numbers, with the tensors' checksums. The length does not depend on
/// the checksums.
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
    with_prefix(&Entries(metadata, tensors), tensors.len())
}

/// A header as JSON, behind its length.
pub(super) fn with_prefix(header: &impl Serialize, tensors: usize) -> Checked<Vec<u8>> {
    let mut bytes = vec![0; PREFIX_BYTES as usize];
    serde_json::to_writer(&mut bytes, header).map_err(|error| Fault::Invalid(error.to_string()))?;
    // The numbers start at a multiple of eight bytes.
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    let len = bytes.len() as u64 - PREFIX_BYTES;
    if len > MAX_HEADER_BYTES {
        return Err(Fault::Invalid(format!(
            "names and shapes of {tensors} tensors take {len} bytes, more than the {MAX_HEADER_BYTES} \
             that the format allows"
        )));
    }
    bytes[..PREFIX_BYTES as usize].copy_from_slice(&len.to_le_bytes());
    Ok(bytes)
}

/// A checksum in the form of the file.
pub(super) fn hex(sum: u32) -> String {
    format!("{sum:08x}")
}

/// The checked header of a file.
#[derive(Debug)]
pub(super) struct FileHeader {
    pub(super) metadata: Metadata,
    layout: Layout,
    /// The tensors that were not taken yet.
    left: BTreeSet<String>,
}

/// A requested tensor.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) key: String,
    /// Where it starts, from the end of the header.
    pub(super) offset: u64,
    pub(super) len: usize,
    /// Its checksum.
    pub(super) sum: u32,
}

impl FileHeader {
    /// Reads a header, and returns the reader at its end. Checks that the tensors cover the rest of
    /// the file without gaps or overlaps.
    pub(super) fn read(path: &Path) -> Checked<(Self, BufReader<File>)> {
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
        let Entries { metadata, tensors } = serde_json::from_slice(&json)
            .map_err(|error| Fault::Invalid(format!("its header can't be read: {error}")))?;
        let header = Self {
            metadata,
            left: tensors.keys().cloned().collect(),
            layout: checked_layout(tensors, data_bytes)?,
        };
        Ok((header, reader))
    }

    fn take_info(&mut self, name: &str) -> Option<&TensorInfo> {
        if self.left.remove(name) {
            self.layout.info(name)
        } else {
            None
        }
    }

    /// Takes the array of `var` with this name.
    pub(super) fn take(&mut self, name: &str, var: &Var) -> Checked<Place> {
        let Some(info) = self.take_info(name) else {
            return Err(Fault::Invalid(format!("it has no tensor {name:?}")));
        };
        let (dtype, shape) = (dtype_in_file(var), var.dims());
        if info.dtype != dtype || info.shape != shape {
            return Err(Fault::Invalid(format!(
                "tensor {name:?} is {} {:?}, expected {dtype} {shape:?}",
                info.dtype, info.shape
            )));
        }
        Ok(Place::new(name, info, var.elem_count()))
    }

    /// Takes the list with this name, if there is one.
    pub(super) fn take_list(&mut self, name: &str) -> Checked<Option<Place>> {
        let Some(info) = self.take_info(name) else {
            return Ok(None);
        };
        let (Dtype::F64, &[len]) = (info.dtype, &*info.shape) else {
            return Err(Fault::Invalid(format!(
                "tensor {name:?} is {} {:?}, expected a list of F64",
                info.dtype, info.shape
            )));
        };
        Ok(Some(Place::new(name, info, len)))
    }

    /// Sets the checksums of the places, which must be all tensors of the file.
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

    /// Checks that all tensors were taken.
    pub(super) fn expect_empty(&self) -> Checked<()> {
        if self.left.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = self.left.iter().map(|name| format!("{name:?}")).collect();
        Err(Fault::Invalid(format!(
            "it has tensors that belong to no Var's state: {}",
            join_names(&names)
        )))
    }
}

impl Place {
    fn new(name: &str, info: &TensorInfo, len: usize) -> Self {
        Self {
            key: name.to_string(),
            offset: info.data_offsets.0 as u64,
            len,
            sum: 0,
        }
    }
}

/// Checks that the tensors follow each other to the end of the file, each as long as its shape
/// says.
fn checked_layout(tensors: HashMap<String, TensorInfo>, data_bytes: u64) -> Checked<Layout> {
    let mut tensors: Vec<(String, TensorInfo)> = tensors.into_iter().collect();
    tensors.sort_by(|(a, of_a), (b, of_b)| (of_a.data_offsets, a).cmp(&(of_b.data_offsets, b)));
    let others = |(_, info): &(_, TensorInfo)| !matches!(info.dtype, Dtype::F32 | Dtype::F64);
    if let Some(index) = tensors.iter().position(others) {
        return Err(misplaced(&tensors, index));
    }
    let Ok(layout) = Layout::new(None, tensors.clone()) else {
        // The crate stops at the first wrong tensor, but does not always say which one it is.
        let counts: Vec<usize> = (1..=tensors.len()).collect();
        let fits = |count: &usize| Layout::new(None, tensors[..*count].to_vec()).is_ok();
        return Err(misplaced(&tensors, counts.partition_point(fits)));
    };
    let end = layout.data_len();
    if end as u64 != data_bytes {
        return Err(Fault::Invalid(format!(
            "its tensors take {end} bytes, but {data_bytes} follow the header: the file was cut or \
             something was appended"
        )));
    }
    Ok(layout)
}

/// The error for the tensor at `index`.
fn misplaced(tensors: &[(String, TensorInfo)], index: usize) -> Fault {
    let end = |(_, info): &(_, TensorInfo)| info.data_offsets.1;
    let expected = tensors[..index].last().map_or(0, end);
    let (name, info) = &tensors[index];
    let (from, to) = info.data_offsets;
    Fault::Invalid(format!(
        "tensor {name:?}, {} {:?}, lies at {from}..{to} of the data, expected it at {expected} and \
         as long as its shape says, in F32 or F64",
        info.dtype, info.shape
    ))
}

/// The header in the form of the file.
struct Entries {
    metadata: Metadata,
    tensors: HashMap<String, TensorInfo>,
}

/// By hand, since a map would silently take the last of two tensors with the same name.
impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
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
                Ok(Entries {
                    metadata: metadata.unwrap_or_default(),
                    tensors,
                })
            }
        }
        deserializer.deserialize_map(Object)
    }
}
