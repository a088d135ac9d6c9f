//! Cutting event files at a step.

use std::fs;
use std::path::Path;

use super::is_ours;
use super::record::first_event;
use crate::error::{Error, Result};
use crate::listing::files;

/// Beside the files while one of them is cut.
pub(crate) const UNFINISHED: &str = ".events.tmp";

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
            let beside = dir.join(UNFINISHED);
            let written = fs::write(&beside, &kept).and_then(|()| fs::rename(&beside, &path));
            written.map_err(Error::io("cut", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tests::scalars;
    use super::super::{EventWriter, is_event_file};
    use super::*;

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
