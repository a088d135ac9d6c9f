//! CSV files that are appended to, and cut at whole rows.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use csv::{ByteRecord, ReaderBuilder, WriterBuilder};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

const BUFFER_BYTES: usize = 64 << 10;

/// A row type, with the names of its columns in order.
pub(crate) trait Row: Serialize + DeserializeOwned {
    const COLUMNS: &'static [&'static str];
}

/// Appends rows.
#[derive(Debug)]
pub(crate) struct CsvFile {
    writer: csv::Writer<File>,
    path: PathBuf,
}

impl CsvFile {
    /// Opens a file for more rows; a new one gets the names of the columns.
    pub(crate) fn append<R: Row>(path: &Path) -> Result<Self> {
        let mut options = File::options();
        let file = options.append(true).create(true).open(path);
        let file = file.map_err(Error::io("open", path))?;
        let is_new = file.metadata().map_err(Error::io("read", path))?.len() == 0;
        let mut csv = Self::on(file, path);
        if is_new {
            let written = csv.writer.write_record(R::COLUMNS);
            written.map_err(|error| csv.failure(error))?;
            csv.flush()?;
        }
        Ok(csv)
    }

    pub(crate) fn on(file: File, path: &Path) -> Self {
        let mut options = WriterBuilder::new();
        options.has_headers(false).buffer_capacity(BUFFER_BYTES);
        Self {
            writer: options.from_writer(file),
            path: path.to_path_buf(),
        }
    }

    pub(crate) fn row<R: Row>(&mut self, row: &R) -> Result<()> {
        let written = self.writer.serialize(row);
        written.map_err(|error| self.failure(error))
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        let flushed = self.writer.flush();
        flushed.map_err(Error::io("write", &self.path))
    }

    fn failure(&self, error: csv::Error) -> Error {
        Error::io("write", &self.path)(io::Error::from(error))
    }
}

/// All whole rows of a file. A row that is still being written is left out.
pub(crate) fn read<R: Row>(path: &Path) -> Result<Vec<R>> {
    let mut rows = Vec::new();
    for_each(path, |row| rows.push(row))?;
    Ok(rows)
}

/// The same, row by row.
pub(crate) fn for_each<R: Row>(path: &Path, mut each: impl FnMut(R)) -> Result<()> {
    walk(path, |row, _| each(row))?;
    Ok(())
}

/// Removes the rows that `keep` refuses, and half a row at the end. A missing file stays missing.
pub(crate) fn cut<R: Row>(path: &Path, mut keep: impl FnMut(R) -> bool) -> Result<()> {
    let length = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    // Neighbours are joined, so an untouched file is one range.
    let mut kept: Vec<Range<u64>> = Vec::new();
    let header = walk(path, |row, bytes: Range<u64>| {
        if keep(row) {
            match kept.last_mut() {
                Some(last) if last.end == bytes.start => last.end = bytes.end,
                _ => kept.push(bytes),
            }
        }
    })?;
    kept.insert(0, 0..header);
    if kept
        .iter()
        .map(|range| range.end - range.start)
        .sum::<u64>()
        == length
    {
        return Ok(());
    }
    copy_parts(path, &kept).map_err(Error::io("cut", path))
}

/// Replaces a file by some parts of it. A kill leaves the old or the new one.
fn copy_parts(path: &Path, parts: &[Range<u64>]) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.tmp"));
    let mut from = File::open(path)?;
    let mut to = BufWriter::new(File::create(&beside)?);
    for part in parts {
        from.seek(SeekFrom::Start(part.start))?;
        io::copy(&mut (&mut from).take(part.end - part.start), &mut to)?;
    }
    to.flush()?;
    drop(to); // some systems cannot rename an open file
    fs::rename(beside, path)
}

/// Calls `each` with every whole row and its place in the file. Returns where the first row starts,
/// 0 if not even the names of the columns are complete.
fn walk<R: Row>(path: &Path, mut each: impl FnMut(R, Range<u64>)) -> Result<u64> {
    let failure = |action| Error::io(action, path);
    let not_ours = |what| Error::NotOurs {
        path: path.to_path_buf(),
        what,
    };
    let file = File::open(path).map_err(failure("open"))?;
    let (length, ends_whole) = ending(&file).map_err(failure("read"))?;
    let mut options = ReaderBuilder::new();
    options.has_headers(false).flexible(true);
    let mut reader = options.from_reader(BufReader::new(file));
    let columns = ByteRecord::from(R::COLUMNS.to_vec());
    let mut header_end = 0;
    let mut record = ByteRecord::new();
    loop {
        let start = reader.position().byte();
        let is_row = reader.read_byte_record(&mut record);
        if !is_row.map_err(|error| failure("read")(io::Error::from(error)))? {
            return Ok(header_end);
        }
        let end = reader.position().byte();
        let is_last = end >= length;
        if is_last && !ends_whole {
            // Half a row of a process that was killed; half a header only if it is one.
            let torn_header = record.iter().zip(R::COLUMNS).all(|(field, name)| {
                name.as_bytes().starts_with(field) && record.len() <= R::COLUMNS.len()
            });
            if header_end == 0 && !torn_header {
                return Err(not_ours("it has other columns".into()));
            }
            return Ok(header_end);
        }
        if header_end == 0 {
            if record != columns {
                return Err(not_ours("it has other columns".into()));
            }
            header_end = end;
            continue;
        }
        match record.deserialize(Some(&columns)) {
            Ok(row) => each(row, start..end),
            Err(_) if is_last => return Ok(header_end),
            Err(error) => return Err(not_ours(error.to_string())),
        }
    }
}

/// The length of a file, and whether it ends with a line break.
fn ending(mut file: &File) -> io::Result<(u64, bool)> {
    let length = file.metadata()?.len();
    let mut last = [0];
    if length > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        file.seek(SeekFrom::Start(0))?;
    }
    Ok((length, last == *b"\n"))
}
