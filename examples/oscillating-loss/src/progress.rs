//! Live bars on the terminal (nothing where there is none).

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::events::Events;
use crate::parallel::Watch;
use crate::run::{Run, Step};
use crate::settings::Settings;
use crate::table::number;

/// A bar a run, with loss and norm; and the run's `TensorBoard` events.
#[derive(Debug)]
pub struct Bars {
    bars: Vec<ProgressBar>,
    events: Vec<Events>,
}

impl Bars {
    /// Bars for these runs, whose events go to `events`.
    ///
    /// # Errors
    /// If the template were broken.
    pub fn new(settings: &[Settings], events: Vec<Events>) -> Result<Self> {
        let names = settings
            .iter()
            .map(|settings| settings.arm.to_string().len());
        let width = names.max().unwrap_or(0);
        let template = format!("{{prefix:{width}}} {{bar:30}} {{pos:>5}}/{{len}} {{msg}}");
        let style = ProgressStyle::with_template(&template)?;
        let all = MultiProgress::new();
        let bar = |settings: &Settings| {
            let bar = all.add(ProgressBar::new(settings.steps as u64));
            bar.with_style(style.clone())
                .with_prefix(settings.arm.to_string())
        };
        Ok(Self {
            bars: settings.iter().map(bar).collect(),
            events,
        })
    }

    /// The event file of a run.
    #[must_use]
    pub fn events(&self, at: usize) -> &Events {
        &self.events[at]
    }

    /// Brings all events to the disk.
    pub fn flush(&self) {
        self.events.iter().for_each(Events::flush);
    }
}

impl Watch for Bars {
    fn step(&self, at: usize, step: &Step) -> Result<()> {
        let bar = &self.bars[at];
        bar.set_position(step.step as u64);
        let (loss, norm) = (number(step.train_loss), number(step.total_norm));
        bar.set_message(format!("loss {loss:>9}  norm {norm:>9}"));
        self.events[at].step(step);
        Ok(())
    }

    fn end(&self, at: usize, run: &Run) -> Result<()> {
        match &run.diverged {
            Some(why) => self.bars[at].abandon_with_message(format!("stopped at {why}")),
            None => self.bars[at].abandon(),
        }
        Ok(())
    }
}

/// One bar for many runs.
#[derive(Debug)]
pub struct Total {
    bar: ProgressBar,
    runs: usize,
    done: AtomicUsize,
    steps: u64,
}

impl Total {
    /// A bar for runs of the same length.
    ///
    /// # Errors
    /// If the template were broken.
    pub fn new(runs: usize, steps: usize) -> Result<Self> {
        let style = ProgressStyle::with_template("{bar:42} {msg}, {eta} left")?;
        let bar = ProgressBar::new((runs * steps) as u64).with_style(style);
        bar.set_message(format!("0 of {runs} runs"));
        Ok(Self {
            bar,
            runs,
            done: AtomicUsize::new(0),
            steps: steps as u64,
        })
    }
}

impl Watch for Total {
    fn step(&self, _: usize, _: &Step) -> Result<()> {
        self.bar.inc(1);
        Ok(())
    }

    fn end(&self, _: usize, run: &Run) -> Result<()> {
        // A run that diverged leaves steps undone that nobody waits for.
        self.bar.inc(self.steps - run.steps.len() as u64);
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        self.bar
            .set_message(format!("{done} of {} runs", self.runs));
        if done == self.runs {
            self.bar.finish_and_clear();
        }
        Ok(())
    }
}
