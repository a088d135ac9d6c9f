//! What is left of each run of a study: a line of JSON, written when the run ends.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::run::Run;
use crate::settings::Settings;

/// How a run went, and what it came to. JSON has no NaN: what a diverged run lacks is `null`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// How it was to go.
    pub settings: Settings,
    /// Why it ended early, if it diverged.
    pub diverged: Option<String>,
    /// The test loss at the end.
    pub final_test_loss: Option<f64>,
    /// The lowest test loss.
    pub best_test_loss: Option<f64>,
    /// See [`roughness`](crate::score::roughness).
    pub roughness: Option<f64>,
    /// The largest finite norm before clipping.
    pub max_total_norm: f64,
    /// The share of steps whose gradients clipping changed.
    pub clipped_fraction: f64,
    /// The steps that were not taken.
    pub num_skipped: usize,
}

impl From<&Run> for Outcome {
    fn from(run: &Run) -> Self {
        let finite = |loss: f64| Some(loss).filter(|loss| loss.is_finite());
        Self {
            settings: run.settings.clone(),
            diverged: run.diverged.clone(),
            final_test_loss: finite(run.final_test_loss()),
            best_test_loss: finite(run.best_test_loss()),
            roughness: run.roughness(),
            max_total_norm: run.max_total_norm(),
            clipped_fraction: run.clipped_fraction(),
            num_skipped: run.steps.iter().filter(|step| step.skipped).count(),
        }
    }
}

/// All runs in a file; none if there is no such file. A last line that a kill has cut off is
/// removed.
///
/// # Errors
/// If the file can't be read, or a line is no outcome.
pub fn read(path: &Path) -> Result<Vec<Outcome>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.with_context(|| format!("can't read `{}`", path.display()))?,
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    if whole.len() < text.len() {
        let file = File::options().write(true).open(path)?;
        file.set_len(whole.len() as u64)?;
    }
    let line = |(at, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("`{}`, line {}", path.display(), at + 1))
    };
    whole.lines().enumerate().map(line).collect()
}

/// Adds a line for a run.
///
/// # Errors
/// If it can't be written; no part of it is left then.
pub fn append(path: &Path, outcome: &Outcome) -> Result<()> {
    let line = serde_json::to_string(outcome)? + "\n";
    let append = || {
        let mut file = File::options().create(true).append(true).open(path)?;
        let before = file.metadata()?.len();
        file.write_all(line.as_bytes()).inspect_err(|_| {
            // The next line would begin in the middle of this one. The error that counts is the one
            // of writing.
            let _ = file.set_len(before);
        })
    };
    append().with_context(|| format!("can't write `{}`", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let outcome = Outcome {
            settings: Settings::default(),
            diverged: None,
            final_test_loss: None,
            best_test_loss: None,
            roughness: None,
            max_total_norm: 1.0,
            clipped_fraction: 0.0,
            num_skipped: 0,
        };
        let error = append(Path::new("/dev/full"), &outcome).unwrap_err();
        assert_eq!(error.to_string(), "can't write `/dev/full`");
    }

    #[test]
    fn what_is_appended_is_read_back_without_a_line_that_was_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        assert_eq!(read(&path).unwrap(), []);
        let outcome = |seed, loss| Outcome {
            settings: Settings {
                seed,
                ..Settings::default()
            },
            diverged: None,
            final_test_loss: loss,
            best_test_loss: loss,
            roughness: Some(0.1 + 0.2),
            max_total_norm: 1e300,
            clipped_fraction: 1.0 / 3.0,
            num_skipped: 2,
        };
        let all = [
            outcome(0, Some(5e-324)),
            outcome(1, None),
            outcome(2, Some(0.3)),
        ];
        for outcome in &all {
            append(&path, outcome).unwrap();
        }
        assert_eq!(read(&path).unwrap(), all);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
        assert_eq!(read(&path).unwrap(), all[..2]);
        append(&path, &all[2]).unwrap();
        assert_eq!(read(&path).unwrap(), all);
        fs::write(&path, "{}\n").unwrap();
        let error = format!("{:#}", read(&path).unwrap_err());
        assert!(error.contains("line 1"), "{error}");
    }
}
