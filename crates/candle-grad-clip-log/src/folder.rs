//! The files of a run in its folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::csv_file;
use crate::error::{Error, Result};
use crate::history::History;
use crate::listing::files;
use crate::rows::{MetricsRow, ParamNormsRow, ScalarRow};
use crate::run_info::{self, RunInfo};
use crate::tensorboard;

pub(crate) const METRICS: &str = "metrics.csv";
pub(crate) const SCALARS: &str = "scalars.csv";
pub(crate) const PARAM_NORMS: &str = "param_norms.csv";
pub(crate) const PAGE: &str = "index.html";

/// The names that a run takes, besides those of event files.
const NAMES: [&str; 5] = [run_info::FILE_NAME, METRICS, SCALARS, PARAM_NORMS, PAGE];

/// The name of a run, which is that of its folder.
pub(crate) fn name(folder: &Path) -> String {
    let absolute = folder.canonicalize();
    let folder = absolute.as_deref().unwrap_or(folder);
    let name = folder.file_name().unwrap_or(folder.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Makes the folder of a new run. Other files may be in it, but none with a name that we take.
pub(crate) fn create(folder: &Path) -> Result<RunInfo> {
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    for name in NAMES {
        let path = folder.join(name);
        if fs::symlink_metadata(&path).is_ok() {
            return Err(Error::Exists { path });
        }
    }
    // TensorBoard would draw the events of two runs as one line.
    let events = files(folder, tensorboard::is_event_file)?;
    if let Some(path) = events.into_iter().next() {
        return Err(Error::Exists { path });
    }
    let info = RunInfo::new();
    info.write(folder)?;
    Ok(info)
}

/// Removes the files of an earlier run, if there is one.
pub(crate) fn remove_run(folder: &Path) -> Result<()> {
    if !folder.exists() || RunInfo::read(folder)?.is_none() {
        return Ok(());
    }
    let mut paths = files(folder, tensorboard::is_ours)?;
    paths.extend(files(folder, is_unfinished)?);
    // The last is run.json, which proves that the others are ours.
    paths.extend(NAMES.iter().rev().map(|name| folder.join(name)));
    for path in paths {
        remove(&path)?;
    }
    Ok(())
}

/// What an earlier process wrote up to `step`; what came later is cut off. `None` if there is no
/// run.
pub(crate) fn resume(folder: &Path, step: u64) -> Result<Option<(RunInfo, History)>> {
    let Some(mut info) = RunInfo::read(folder)? else {
        return Ok(None);
    };
    for path in files(folder, is_unfinished)? {
        remove(&path)?;
    }
    let mut history = History::default();
    let path = |name: &str| -> PathBuf { folder.join(name) };
    csv_file::cut(&path(METRICS), |row: MetricsRow| {
        let is_kept = row.step <= step;
        if is_kept {
            history.step(row);
        }
        is_kept
    })?;
    csv_file::cut(&path(SCALARS), |row: ScalarRow| {
        let is_kept = row.step <= step;
        if is_kept {
            history.scalar(row);
        }
        is_kept
    })?;
    csv_file::cut(&path(PARAM_NORMS), |row: ParamNormsRow| {
        let is_kept = row.last_step <= step;
        if is_kept {
            history.param_norms.restore(&row);
        }
        is_kept
    })?;
    tensorboard::cut(folder, step)?;
    info.start(step);
    info.write(folder)?;
    Ok(Some((info, history)))
}

/// Whether a file was to replace one of ours when the process was killed.
fn is_unfinished(name: &str) -> bool {
    let hidden = name.strip_prefix('.').unwrap_or_default();
    let is_temporary = Path::new(name).extension().is_some_and(|end| end == "tmp");
    let is_of_ours = NAMES.iter().any(|ours| hidden.starts_with(ours));
    name == tensorboard::UNFINISHED || (is_temporary && is_of_ours)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}
