//! What `TensorBoard` gets of a run.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_grad_clip::NamedVars;

use crate::histogram::Histogram;
use crate::run::Step;
use crate::tensorboard::{self, EventWriter};

/// The event file of one run, written while it goes. Where it can't be written any more, a warning
/// says so once, and the run goes on without.
#[derive(Debug)]
pub struct Events(Mutex<State>);

#[derive(Debug)]
struct State {
    /// None after a failure.
    writer: Option<EventWriter>,
    num_clipped: usize,
}

impl State {
    fn write(&mut self, write: impl FnOnce(&mut EventWriter) -> Result<()>) {
        if let Some(Err(error)) = self.writer.as_mut().map(write) {
            eprintln!("warning: {error:#}; the run goes on without events for TensorBoard");
            self.writer = None;
        }
    }
}

impl Events {
    /// Starts an event file in `folder`, in the place of an earlier run's (`TensorBoard` would draw
    /// both as one line). Event files of other programs stay.
    ///
    /// # Errors
    /// If the folder can't be written to.
    pub fn create(folder: &Path) -> Result<Self> {
        remove_old(folder).with_context(|| format!("old event files in `{}`", folder.display()))?;
        Ok(Self(Mutex::new(State {
            writer: Some(EventWriter::create(folder)?),
            num_clipped: 0,
        })))
    }

    /// Adds a step; with a test loss, everything so far goes to the disk.
    pub fn step(&self, step: &Step) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.num_clipped += usize::from(step.was_clipped);
        let clipped_fraction = state.num_clipped as f64 / step.step as f64;
        let scalars = [
            ("loss/train", Some(step.train_loss)),
            ("loss/test", step.test_loss),
            ("grad/total_norm", Some(step.total_norm)),
            ("grad/clip_coef", Some(step.clip_coef)),
            ("grad/clipped_fraction", Some(clipped_fraction)),
        ];
        state.write(|writer| {
            for (tag, value) in scalars {
                if let Some(value) = value {
                    writer.scalar(tag, step.step as u64, value as f32)?;
                }
            }
            if step.test_loss.is_some() {
                writer.flush()?;
            }
            Ok(())
        });
    }

    /// Adds a histogram of the gradient of each Var that has one.
    ///
    /// # Errors
    /// If a gradient can't be read.
    pub fn gradients(&self, step: usize, vars: &NamedVars, grads: &GradStore) -> Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, var) in vars.names().iter().zip(vars.vars()) {
            if let Some(grad) = grads.get(var) {
                let histogram = Histogram::of_tensor(grad)?;
                let tag = format!("gradients/{name}");
                state.write(|writer| writer.histogram(&tag, step as u64, histogram));
            }
        }
        Ok(())
    }

    /// Brings the rest to the disk.
    pub fn flush(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.write(EventWriter::flush);
    }
}

fn remove_old(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if tensorboard::is_ours(&name.to_string_lossy()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::*;
    use crate::tensorboard::tests::histograms;

    /// A device that takes nothing: every write fails as on a full disk.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_ends_the_events_and_not_the_run() {
        let path = Path::new("/dev/full");
        let file = fs::File::options().write(true).open(path).unwrap();
        let events = Events(Mutex::new(State {
            writer: Some(EventWriter::on(file, path.to_owned())),
            num_clipped: 0,
        }));
        let step = |step| Step {
            step,
            train_loss: 1.0,
            test_loss: step.is_multiple_of(2).then_some(1.0),
            total_norm: 1.0,
            clipped_norm: 1.0,
            clip_coef: 1.0,
            was_clipped: false,
            skipped: false,
        };
        let is_written = || events.0.lock().unwrap().writer.is_some();
        events.step(&step(1));
        assert!(is_written(), "it is only buffered yet");
        events.step(&step(2));
        assert!(!is_written());
        events.step(&step(3));
        events.flush();
        let var = Var::new(&[1f32], &Device::Cpu).unwrap();
        let grads = var.sqr().unwrap().backward().unwrap();
        let vars = vec![("w".to_owned(), var)];
        events.gradients(4, &vars.into(), &grads).unwrap();
    }

    #[test]
    fn a_histogram_of_each_gradient_there_is() {
        let var = |values: &[f32]| Var::new(values, &Device::Cpu).unwrap();
        let (w, unused) = (var(&[1.0, 2.0]), var(&[1.0]));
        let vars = vec![("w".to_owned(), w.clone()), ("unused".to_owned(), unused)];
        let towards = Tensor::new(&[0.5f32, -3.0], &Device::Cpu).unwrap();
        let loss = (w.as_tensor() * towards).unwrap().sum_all().unwrap();

        let folder = tempfile::tempdir().unwrap();
        let events = Events::create(folder.path()).unwrap();
        events
            .gradients(7, &vars.into(), &loss.backward().unwrap())
            .unwrap();
        events.flush();
        let expected = Histogram::of(&[0.5, -3.0]);
        assert_eq!(
            histograms(folder.path()),
            [(7, "gradients/w".to_owned(), expected)]
        );
    }
}
