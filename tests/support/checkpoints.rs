//! Folders for checkpoints, and files that are almost checkpoints.
#![allow(clippy::missing_errors_doc)] // those of the file system, and of JSON

use std::fs;
use std::io::{Error, Result};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

/// A new folder, removed when dropped.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// In the system's folder for temporary files.
    pub fn new() -> Result<Self> {
        Self::inside(&std::env::temp_dir())
    }

    /// In memory where the system has a folder for that: waiting for a disk takes its time.
    pub fn in_memory() -> Result<Self> {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() {
            return Self::inside(memory).or_else(|_| Self::new());
        }
        Self::new()
    }

    fn inside(parent: &Path) -> Result<Self> {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("candle-grad-clip-{}-{number}", std::process::id());
        let path = parent.join(name);
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Deref for Folder {
    type Target = Path;
    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A separate file system, of 64 KiB; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk(Folder);

impl SmallDisk {
    /// None where this user may not mount one.
    pub fn mount() -> Result<Option<Self>> {
        let folder = Folder::new()?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(&*folder)
            .stderr(Stdio::null())
            .status();
        let mounted = cfg!(target_os = "linux") && mounted.is_ok_and(|status| status.success());
        Ok(mounted.then_some(Self(folder)))
    }
}

impl Deref for SmallDisk {
    type Target = Path;
    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&*self.0).status();
    }
}

/// The names in a folder, sorted.
pub fn names_in(folder: &Path) -> Result<Vec<String>> {
    let name = |entry: Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = fs::read_dir(folder)?.map(name).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

/// A safetensors file with another header, given as text.
#[must_use]
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// The header of a safetensors file as text, and what follows.
pub fn split(bytes: &[u8]) -> Result<(&str, &[u8])> {
    let short = || Error::other("too short");
    let (len, rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
    let (header, data) = rest
        .split_at_checked(u64::from_le_bytes(*len) as usize)
        .ok_or_else(short)?;
    Ok((std::str::from_utf8(header).map_err(Error::other)?, data))
}

/// A checkpoint whose header was edited as JSON, and its document with it, which `edit` gets
/// second.
pub fn edited(bytes: &[u8], edit: impl FnOnce(&mut Value, &mut Value)) -> Result<Vec<u8>> {
    let (header, data) = split(bytes)?;
    let mut header: Value = serde_json::from_str(header)?;
    let text = header["__metadata__"]["checkpoint"]
        .as_str()
        .unwrap_or("{}");
    let mut document: Value = serde_json::from_str(text)?;
    let sum_before = header["__metadata__"]["checkpoint_crc32"].clone();
    edit(&mut header, &mut document);
    if let Some(entry) = header.pointer_mut("/__metadata__/checkpoint") {
        let document = document.to_string();
        let sum = crc32fast::hash(document.as_bytes());
        *entry = Value::String(document);
        let old = &mut header["__metadata__"]["checkpoint_crc32"];
        if *old == sum_before {
            *old = format!("{sum:08x}").into();
        }
    }
    Ok(with_header(&header.to_string(), data))
}

/// A checkpoint in which a tensor's bytes were edited, and its checksum with them.
pub fn with_tensor(bytes: &[u8], name: &str, edit: impl FnOnce(&mut [u8])) -> Result<Vec<u8>> {
    let (header, data) = split(bytes)?;
    let (mut header, mut data): (Value, _) = (serde_json::from_str(header)?, data.to_vec());
    let tensors = header
        .as_object()
        .ok_or_else(|| Error::other("no object"))?;
    let mut names: Vec<&String> = tensors
        .keys()
        .filter(|key| *key != "__metadata__")
        .collect();
    names.sort();
    let place = names.iter().position(|other| *other == name);
    let place = place.ok_or_else(|| Error::other(format!("no tensor {name}")))?;
    let [from, to] = serde_json::from_value::<[usize; 2]>(header[name]["data_offsets"].clone())?;
    edit(&mut data[from..to]);
    let mut sum = crc32fast::Hasher::new();
    sum.update(name.as_bytes());
    sum.update(&data[from..to]);
    let entry = &mut header["__metadata__"]["tensors_crc32"];
    let mut sums = entry.as_str().unwrap_or_default().to_string();
    sums.replace_range(8 * place..8 * place + 8, &format!("{:08x}", sum.finalize()));
    *entry = sums.into();
    Ok(with_header(&header.to_string(), &data))
}
