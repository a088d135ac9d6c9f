//! `manifest.json`: what belongs to a checkpoint, with sizes and checksums. It is written last.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::folder::{MANIFEST, MODEL, OPTIMIZER, STATE, create_file};
use crate::checkpoint::file::{BUFFER_BYTES, hex};
use crate::error::{Error, Result};

const FORMAT: &str = "candle-grad-clip checkpoint";
/// A reader that does not know a version refuses it. Any new field needs a new version.
const VERSION: u32 = 1;
/// The files that a manifest lists.
const LISTED: [&str; 3] = [MODEL, OPTIMIZER, STATE];
/// The checksum of the text before it ends the file.
const SEAL: &str = ",\n  \"crc32\": \"";

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    format: String,
    format_version: u32,
    crate_version: String,
    pub(super) step: u64,
    /// Counts the saves to a folder: of two checkpoints, the one with the larger number is newer.
    pub(super) save: u64,
    /// Finite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) loss: Option<f64>,
    files: BTreeMap<String, FileRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRecord {
    bytes: u64,
    crc32: String,
}

/// Why a checkpoint can't be used.
#[derive(Debug)]
pub(super) enum Flaw {
    /// A file is damaged: a reason to go back to an older checkpoint.
    Damage(String),
    /// Anything else, which an older checkpoint would not change.
    Error(Error),
}

impl From<Error> for Flaw {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

pub(super) type Sound<T> = std::result::Result<T, Flaw>;

impl Manifest {
    /// Of the files in a folder.
    pub(super) fn of(folder: &Path, step: u64, save: u64, loss: Option<f64>) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        for name in LISTED {
            files.insert(name.to_string(), FileRecord::of(&folder.join(name))?);
        }
        Ok(Self {
            format: FORMAT.to_string(),
            format_version: VERSION,
            crate_version: env!("CARGO_PKG_VERSION").to_string(),
            step,
            save,
            loss: loss.filter(|loss| loss.is_finite()),
            files,
        })
    }

    /// Writes it into its folder.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(MANIFEST);
        let write = |out: &mut BufWriter<File>| {
            let json = serde_json::to_string_pretty(self).map_err(io::Error::from)?;
            let open = json.strip_suffix("\n}").unwrap_or(&json);
            let sum = hex(crc32fast::hash(open.as_bytes()));
            Ok(write!(out, "{open}{SEAL}{sum}\"\n}}\n")?)
        };
        create_file(&path, &mut { write }).map_err(|fault| fault.at(&path))
    }

    /// Reads the manifest of a folder, and checks nothing else.
    pub(super) fn read(folder: &Path) -> Sound<Self> {
        let path = folder.join(MANIFEST);
        let damage = |reason: String| Flaw::Damage(format!("{MANIFEST} {reason}"));
        let bytes = fs::read(&path).map_err(|error| flaw(&path, MANIFEST, error))?;
        let text = str::from_utf8(&bytes).ok();
        let Some((text, seal)) = text.and_then(|text| text.rsplit_once(SEAL)) else {
            return Err(damage(format!(
                "is cut short: it has {} bytes",
                bytes.len()
            )));
        };
        let sum = hex(crc32fast::hash(text.as_bytes()));
        if seal != format!("{sum}\"\n}}\n") {
            return Err(damage(format!("is damaged: its checksum is not {sum}")));
        }
        Self::parse(&format!("{text}\n}}"), &path).map_err(Flaw::Error)
    }

    /// Parses a text that is as it was written.
    fn parse(text: &str, path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
            crate_version: String,
        }
        let invalid = |reason: String| Error::Checkpoint {
            path: path.to_path_buf(),
            reason,
        };
        let unreadable = |error: serde_json::Error| invalid(format!("it can't be read: {error}"));
        let version: Version = serde_json::from_str(text).map_err(unreadable)?;
        if version.format_version != VERSION {
            return Err(invalid(format!(
                "its format version is {}, expected {VERSION}; it was written by candle-grad-clip {}: load it with \
                 that version",
                version.format_version, version.crate_version
            )));
        }
        serde_json::from_str(text).map_err(unreadable)
    }

    /// Compares the files of the folder with the manifest.
    pub(super) fn verify(&self, folder: &Path) -> Sound<()> {
        LISTED
            .into_iter()
            .try_for_each(|name| self.verify_file(folder, name))
    }

    pub(super) fn verify_file(&self, folder: &Path, name: &str) -> Sound<()> {
        let path = folder.join(name);
        let Some(expected) = self.files.get(name) else {
            return Err(Flaw::Damage(format!("{MANIFEST} does not list {name}")));
        };
        let io_flaw = |error| flaw(&path, name, error);
        let bytes = fs::metadata(&path).map_err(io_flaw)?.len();
        if bytes != expected.bytes {
            return Err(Flaw::Damage(format!(
                "{name} has {bytes} bytes, expected {}",
                expected.bytes
            )));
        }
        let found = FileRecord::of(&path).map_err(io_flaw)?;
        if found != *expected {
            return Err(Flaw::Damage(format!(
                "{name} is damaged: its checksum is {}, expected {}",
                found.crc32, expected.crc32
            )));
        }
        Ok(())
    }
}

impl FileRecord {
    fn of(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let (mut bytes, mut sum) = (0, crc32fast::Hasher::new());
        loop {
            let read = match file.read(&mut buffer) {
                Ok(0) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                read => read?,
            };
            bytes += read as u64;
            sum.update(&buffer[..read]);
        }
        Ok(Self {
            bytes,
            crc32: hex(sum.finalize()),
        })
    }
}

/// A file that can't be read is damaged, unless the error says nothing about the file.
fn flaw(path: &Path, name: &str, source: io::Error) -> Flaw {
    match source.kind() {
        ErrorKind::NotFound => Flaw::Damage(format!("{name} is missing")),
        ErrorKind::PermissionDenied | ErrorKind::OutOfMemory => Flaw::Error(Error::CheckpointIo {
            path: path.to_path_buf(),
            source,
        }),
        _ => Flaw::Damage(format!("{name} can't be read: {source}")),
    }
}
