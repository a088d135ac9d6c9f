//! Making a log, and its options.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Clock, Numbering, RunLog};
use crate::error::Result;
use crate::files::Files;
use crate::folder;
use crate::history::History;
use crate::progress::Progress;
use crate::run_info::RunInfo;

/// The most time until the first page, so that a newcomer sees one at once.
const FIRST_PAGE: Duration = Duration::from_secs(1);

impl RunLog {
    /// Starts a run in a new folder, or in one without files of a run. Other files in it stay.
    ///
    /// # Errors
    /// [`Error::Exists`](crate::Error::Exists) if a file of a run is there, from whatever program;
    /// it is left as it is. [`Error::Io`](crate::Error::Io) if the folder can't be written to.
    pub fn create(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        Ok(Self::new(
            folder,
            folder::create(folder)?,
            History::default(),
        ))
    }

    /// Like [`create`](Self::create), but in the place of an earlier run of this crate, whose files
    /// are removed. Other files stay.
    ///
    /// # Errors
    /// As [`create`](Self::create): files that have the names of ours, but are not, are not
    /// replaced.
    pub fn overwrite(folder: impl AsRef<Path>) -> Result<Self> {
        folder::remove_run(folder.as_ref())?;
        Self::create(folder)
    }

    /// Goes on with a run after `step`, the step of the checkpoint that was loaded. What was logged
    /// of later steps is cut off, also half records of a process that was killed. (In a long run,
    /// the norms by Var stand for many steps at once. Those that `step` lies among go too.) Without
    /// a run in the folder it is [`create`](Self::create).
    ///
    /// The next report's number should be above `step`, as of an optimizer that was saved and
    /// loaded. If the optimizer is new and counts from 1, `step` is added. A warning names the steps
    /// up to `step` that are missing: [`flush`](Self::flush) before each checkpoint prevents that.
    ///
    /// # Errors
    /// [`Error::NotOurs`](crate::Error::NotOurs) if a file has contents that this crate does not
    /// write; [`Error::Io`](crate::Error::Io).
    pub fn resume(folder: impl AsRef<Path>, step: u64) -> Result<Self> {
        let folder = folder.as_ref();
        match folder::resume(folder, step)? {
            None => Self::create(folder),
            Some((info, history)) => {
                let limit = info.optimizer.as_ref().and_then(|opt| opt.max_norm);
                let mut log = Self::new(folder, info, history);
                log.limit = limit;
                log.numbering.resumed = Some(step);
                log.numbering.last = log.history.last.as_ref().map_or(0, |row| row.step);
                log.warn_of_gap(step);
                Ok(log)
            }
        }
    }

    /// A log may have every tenth step only: a gap is longer than the usual one.
    fn warn_of_gap(&mut self, step: u64) {
        let last = self.numbering.last;
        let usual = last.div_ceil(self.history.steps.max(1)).max(1);
        if step.saturating_sub(last) >= usual {
            let first = last + 1;
            self.files.warn(format!(
                "steps {first} to {step} are missing from the log in `{}`: call flush before you \
                 save a checkpoint",
                self.folder.display()
            ));
        }
    }

    fn new(folder: &Path, info: RunInfo, history: History) -> Self {
        let now = Instant::now();
        let before = history.last.as_ref().map_or(0.0, |row| row.seconds);
        Self {
            folder: folder.to_path_buf(),
            info,
            files: Files::new(folder),
            waiting: VecDeque::new(),
            numbering: Numbering {
                resumed: None,
                offset: 0,
                last: 0,
                has_warned: false,
            },
            limit: None,
            clock: Clock {
                start: now,
                before,
                steps_before: history.steps,
            },
            history,
            next_flush: now,
            page_interval: Some(Duration::from_secs(5)),
            next_page: now + FIRST_PAGE,
            progress: Progress::default(),
            display: None,
            with_param_norm_events: false,
            is_ended: false,
        }
    }

    /// How the progress is shown; the default is [`Progress::Auto`].
    #[must_use]
    pub fn with_progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }

    /// The least time between two writes of `index.html`; 5 seconds if this is not called. Writing
    /// takes at most 1 % of the time, so it may be longer. With `None` only
    /// [`finish`](Self::finish) writes the page.
    #[must_use]
    pub fn with_page_interval(mut self, interval: impl Into<Option<Duration>>) -> Self {
        self.page_interval = interval.into();
        if let Some(interval) = self.page_interval {
            self.next_page = self.next_page.min(Instant::now() + interval);
        }
        self
    }

    /// With `true`, a failure to write is an error, and so is a step whose number is not above the
    /// one before. Otherwise, a warning says it once: the file is given up, the step is logged.
    #[must_use]
    pub fn with_strict(mut self, strict: bool) -> Self {
        self.files.set_strict(strict);
        self
    }

    /// With `false`, there is no event file for `TensorBoard`.
    #[must_use]
    pub fn with_tensorboard(mut self, with_tensorboard: bool) -> Self {
        if !with_tensorboard {
            self.files.end_events();
        }
        self
    }

    /// With `true`, the norm of each Var's gradient goes to `TensorBoard` too, as
    /// `grad_norm/NAME`. It needs
    /// [`ClippedOptimizer::with_param_norms`](candle_grad_clip::ClippedOptimizer::with_param_norms).
    #[must_use]
    pub fn with_param_norm_events(mut self, with_events: bool) -> Self {
        self.with_param_norm_events = with_events;
        self
    }
}
