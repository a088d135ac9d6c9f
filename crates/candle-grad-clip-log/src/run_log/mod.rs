//! The log of one run.

mod making;
mod work;

use std::collections::VecDeque;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::backprop::GradStore;
use candle_grad_clip::{ClippedOptimizer, NamedVars, StepReport};
use candle_nn::Optimizer;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::files::Files;
use crate::histogram::Histogram;
use crate::history::History;
use crate::progress::{self, Progress};
use crate::rows::ScalarRow;
use crate::run_info::{OptimizerInfo, RunInfo, State};

/// Writes what a training run leaves in its folder. See the [crate's documentation](crate) for the
/// files and an example.
///
/// Each run needs its own folder and `RunLog`; several may run in several threads. Where a
/// file can't be written any more, for example because the disk is full, a warning says so once
/// ([`tracing`], and stderr unless the progress is off) and training goes on. With
/// [`with_strict`](Self::with_strict) it is an error.
#[derive(Debug)]
pub struct RunLog {
    folder: PathBuf,
    info: RunInfo,
    history: History,
    files: Files,
    /// Steps whose numbers are still on a GPU, the oldest first.
    waiting: VecDeque<Waiting>,
    numbering: Numbering,
    limit: Option<f64>,
    clock: Clock,
    next_flush: Instant,
    /// `None`: only the last page.
    page_interval: Option<Duration>,
    next_page: Instant,
    progress: Progress,
    /// Made at the first step, when the options are known.
    display: Option<progress::Display>,
    with_param_norm_events: bool,
    is_ended: bool,
}

#[derive(Debug)]
struct Waiting {
    report: StepReport,
    step: u64,
    loss: Option<f64>,
    limit: Option<f64>,
    seconds: f64,
}

/// The numbers of the steps.
#[derive(Debug)]
struct Numbering {
    /// The step after which a resumed run goes on, until the first report.
    resumed: Option<u64>,
    /// What is added to the numbers of the reports.
    offset: u64,
    last: u64,
    has_warned: bool,
}

/// The time of a run over all its processes.
#[derive(Debug)]
struct Clock {
    start: Instant,
    /// Seconds of earlier processes.
    before: f64,
    /// Steps of earlier processes.
    steps_before: u64,
}

impl Clock {
    fn seconds(&self) -> f64 {
        self.before + self.start.elapsed().as_secs_f64()
    }
}

impl RunLog {
    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Notes the names and shapes of the Vars, the clip, the learning rate and the device for the
    /// page and `run.json`. If the clip is [`Clip::norm`](candle_grad_clip::Clip::norm), its limit
    /// is drawn beside the norms.
    ///
    /// # Errors
    /// Under `strict`, if `run.json` can't be written.
    pub fn describe<O: Optimizer + 'static>(
        &mut self,
        optimizer: &ClippedOptimizer<O>,
    ) -> Result<()> {
        let optimizer = OptimizerInfo::new(optimizer);
        self.limit = optimizer.max_norm;
        self.info.optimizer = Some(optimizer);
        self.write_info()
    }

    /// Notes what was run, for example the struct of the command line's options, for the page and
    /// `run.json`.
    ///
    /// # Errors
    /// [`Error::Config`] if JSON can't hold it; under `strict`, if `run.json` can't be written.
    pub fn config(&mut self, config: &impl Serialize) -> Result<()> {
        self.info.config = serde_json::to_value(config).map_err(Error::Config)?;
        self.write_info()
    }

    /// Sets the number of the last step of the run, for the time left.
    pub fn total_steps(&mut self, steps: u64) {
        self.info.total_steps = Some(steps);
    }

    /// Sets the limit that is drawn beside the norms of the steps from now on. Only needed for a
    /// limit that changes, for example by a schedule: else [`describe`](Self::describe) knows it.
    pub fn limit(&mut self, limit: impl Into<Option<f64>>) {
        self.limit = limit.into();
    }

    /// Logs a step. Call it after each one. The loss is optional.
    ///
    /// It never waits for a GPU: a report whose numbers are still there is kept, and read by a
    /// later call or by [`finish`](Self::finish). (To read the loss from a GPU does wait for it; so you
    /// may give it now and then only, or the one of the step before.)
    ///
    /// A loss or norm that is NaN or infinite is logged as it is.
    ///
    /// # Errors
    /// [`Error::Report`] if a GPU failed; under `strict`, [`Error::StepNotRising`] and failures to
    /// write.
    pub fn step(&mut self, report: &StepReport, loss: impl Into<Option<f64>>) -> Result<()> {
        let step = self.number(report.step())?;
        self.waiting.push_back(Waiting {
            report: report.clone(),
            step,
            loss: loss.into(),
            limit: self.limit,
            seconds: self.clock.seconds(),
        });
        self.drain(false)?;
        self.now_and_then()
    }

    /// Logs any other number. The test loss is best named "loss/test": names that begin with
    /// "loss/" are drawn beside the loss of the steps. For `TensorBoard`, the part before the slash
    /// is the name of a group.
    ///
    /// # Errors
    /// Under `strict`, if a file can't be written.
    pub fn scalar(&mut self, name: &str, step: u64, value: f64) -> Result<()> {
        let row = ScalarRow::new(step, name, value);
        self.files.scalar(&row)?;
        self.files.points(step, [(name, value)])?;
        self.history.scalar(row);
        Ok(())
    }

    /// Adds a histogram of each gradient to the event file for `TensorBoard`. It reads all
    /// gradients, from a GPU too, so it is best done now and then only.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a gradient can't be read; under `strict`, if the file can't be written.
    pub fn histograms(&mut self, step: u64, vars: &NamedVars, grads: &GradStore) -> Result<()> {
        for (name, var) in vars.names().iter().zip(vars.vars()) {
            if let Some(grad) = grads.get(var) {
                let histogram = Histogram::of_tensor(grad)?;
                let tag = format!("gradients/{name}");
                self.files.histogram(&tag, step, histogram)?;
            }
        }
        Ok(())
    }

    /// Hands all steps so far to the system, waiting for those that are still on a GPU. Call it
    /// before you save a checkpoint: else a kill right after the save can cost the steps of the
    /// last two seconds, which a resumed run doesn't do again.
    ///
    /// # Errors
    /// [`Error::Report`] if a GPU failed; under `strict`, if a file can't be written.
    pub fn flush(&mut self) -> Result<()> {
        self.drain(true)?;
        self.files.flush()
    }

    /// Ends the run: waits for the reports that are still on a GPU, and writes the rest and the
    /// last page. Dropping the log does the same, without errors, and the page then says that the
    /// run was stopped.
    ///
    /// # Errors
    /// [`Error::Report`] if a GPU failed; under `strict`, failures to write.
    pub fn finish(mut self) -> Result<()> {
        self.end(State::Finished)
    }

    /// Like [`finish`](Self::finish), for a run that ends by an error or by Ctrl-C: the page says
    /// that it was stopped, and why.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub fn stopped_by(mut self, reason: impl Display) -> Result<()> {
        self.info.stopped_by = Some(reason.to_string());
        self.end(State::Stopped)
    }
}

impl Drop for RunLog {
    fn drop(&mut self) {
        if let Err(error) = self.end(State::Stopped) {
            tracing::warn!("the log of the run is not complete: {}", error.with_cause());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{Device, Tensor, Var};
    use candle_grad_clip::Clip;
    use candle_nn::SGD;

    use super::*;
    use crate::tensorboard::tests::{histograms, scalars};

    #[test]
    fn a_log_can_go_to_another_thread() {
        fn is_send<T: Send>() {}
        is_send::<RunLog>();
    }

    #[test]
    fn what_tensorboard_gets_of_two_steps() {
        let var = |values: &[f32]| Var::new(values, &Device::Cpu).unwrap();
        let (w, unused) = (var(&[1.0, 2.0]), var(&[1.0]));
        let vars = vec![("w".to_owned(), w.clone()), ("unused".to_owned(), unused)];
        let sgd = SGD::new(vec![w.clone()], 0.0).unwrap();
        let clip: Clip = "norm:2.5,eps=0".parse().unwrap();
        let mut opt = ClippedOptimizer::wrap(sgd, vars, clip).unwrap();
        opt = opt.with_param_norms(true);
        let towards = Tensor::new(&[3.0f32, -4.0], &Device::Cpu).unwrap();
        let loss = (w.as_tensor() * towards).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();

        let folder = tempfile::tempdir().unwrap();
        let log = RunLog::create(folder.path()).unwrap();
        let mut log = log
            .with_progress(Progress::Off)
            .with_param_norm_events(true);
        let report = opt.step_report(&grads).unwrap();
        log.step(&report, 0.5).unwrap();
        opt.set_clip(Clip::none()).unwrap();
        let report = opt.step_report(&grads).unwrap();
        log.step(&report, None).unwrap();
        log.histograms(2, opt.vars(), &grads).unwrap();
        log.scalar("loss/test", 2, 0.25).unwrap();
        log.finish().unwrap();

        let point = |step, tag: &str, value| (step, tag.to_owned(), value);
        let expected = [
            point(1, "loss/train", 0.5),
            point(1, "grad/total_norm", 5.0),
            point(1, "grad/clipped_norm", 2.5),
            point(1, "grad/clip_coef", 0.5),
            point(1, "grad/clipped_fraction", 1.0),
            point(1, "grad_norm/w", 5.0),
            point(2, "grad/total_norm", 5.0),
            point(2, "grad/clipped_norm", 5.0),
            point(2, "grad/clip_coef", 1.0),
            point(2, "grad/clipped_fraction", 0.5),
            point(2, "grad_norm/w", 5.0),
            point(2, "loss/test", 0.25),
        ];
        assert_eq!(scalars(folder.path()), expected);
        let expected = (2, "gradients/w".to_owned(), Histogram::of(&[3.0, -4.0]));
        assert_eq!(histograms(folder.path()), [expected]);
    }

    #[test]
    fn missing_steps_are_a_warning() {
        let folder = tempfile::tempdir().unwrap();
        let row = |step: u64| format!("{step},,1.0,1.0,1.0,,0,0,,0,0,0.0\n");
        let resumed = |steps: &[u64], at| {
            drop(RunLog::resume(folder.path(), 0).unwrap());
            let path = folder.path().join("metrics.csv");
            let columns = <crate::rows::MetricsRow as crate::csv_file::Row>::COLUMNS.join(",");
            let rows: String = steps.iter().map(|step| row(*step)).collect();
            std::fs::write(path, format!("{columns}\n{rows}")).unwrap();
            RunLog::resume(folder.path(), at)
                .unwrap()
                .files
                .take_warnings()
        };
        assert!(resumed(&[1, 2, 3, 4], 4).is_empty());
        let warning = &resumed(&[1, 2], 4)[0];
        assert!(warning.starts_with("steps 3 to 4 are missing"), "{warning}");
        assert!(resumed(&[10, 20], 25).is_empty());
        assert!(!resumed(&[10, 20], 30).is_empty());
        assert!(resumed(&[], 0).is_empty());
    }
}
