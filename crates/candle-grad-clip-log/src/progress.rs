//! The progress line in the terminal.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::history::History;
use crate::number::{number, time};

/// How a run shows its progress, on stderr.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Progress {
    /// One line that is rewritten, on a terminal. Elsewhere as `Lines(100)`, but with at least 10
    /// seconds between two lines.
    #[default]
    Auto,
    /// A line every so many steps.
    Lines(u64),
    /// Nothing.
    Off,
}

/// The time between two updates of the line on a terminal.
const UPDATE: Duration = Duration::from_millis(100);

/// The time between two lines elsewhere, if no number of steps is asked for.
const LINES: Duration = Duration::from_secs(10);

/// What is shown.
#[derive(Debug)]
pub(crate) enum Display {
    Bar {
        bar: ProgressBar,
        next: Instant,
    },
    Lines {
        name: String,
        every: u64,
        pause: Duration,
        next: Instant,
    },
    Off,
}

impl Display {
    /// Of the run with this name.
    pub(crate) fn new(progress: Progress, name: &str) -> Self {
        let next = Instant::now();
        let lines = |every, pause| Self::Lines {
            name: name.to_owned(),
            every,
            pause,
            next,
        };
        match progress {
            Progress::Auto if stderr().is_terminal() => {
                let bar = ProgressBar::no_length();
                let template = "{prefix} {wide_bar} {pos}/{len} {msg}";
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style);
                }
                bar.set_prefix(name.to_owned());
                Self::Bar { bar, next }
            }
            Progress::Auto => lines(100, LINES),
            Progress::Lines(every) => lines(every.max(1), Duration::ZERO),
            Progress::Off => Self::Off,
        }
    }

    pub(crate) fn step(&mut self, history: &History, total: Option<u64>, speed: Option<f64>) {
        let Some(step) = history.last.as_ref().map(|row| row.step) else {
            return;
        };
        match self {
            Self::Bar { bar, next } => {
                let now = Instant::now();
                if now >= *next {
                    *next = now + UPDATE;
                    show(bar, step, history, total, speed);
                }
            }
            Self::Lines {
                name,
                every,
                pause,
                next,
            } => {
                let now = Instant::now();
                if step.is_multiple_of(*every) && now >= *next {
                    *next = now + *pause;
                    eprintln!("{name}: {}", line(step, history, total, speed));
                }
            }
            Self::Off => {}
        }
    }

    pub(crate) fn warn(&self, warning: &str) {
        match self {
            Self::Bar { bar, .. } => bar.println(warning),
            Self::Lines { name, .. } => eprintln!("{name}: {warning}"),
            Self::Off => {}
        }
    }

    pub(crate) fn end(&mut self, history: &History, total: Option<u64>) {
        if let Self::Bar { bar, .. } = self {
            if let Some(last) = &history.last {
                show(bar, last.step, history, total, None);
            }
            bar.abandon(); // the line stays
        }
    }
}

fn show(bar: &ProgressBar, step: u64, history: &History, total: Option<u64>, speed: Option<f64>) {
    if let Some(total) = total {
        bar.set_length(total);
    }
    bar.set_position(step);
    bar.set_message(numbers(history, time_left(step, total, speed)));
}

fn line(step: u64, history: &History, total: Option<u64>, speed: Option<f64>) -> String {
    let of = total.map_or_else(String::new, |total| format!("/{total}"));
    let numbers = numbers(history, time_left(step, total, speed));
    format!("step {step}{of}: {numbers}")
}

fn numbers(history: &History, left: Option<f64>) -> String {
    let Some(last) = &history.last else {
        return String::new();
    };
    let mut parts = Vec::new();
    if let Some(loss) = last.loss {
        parts.push(format!("loss {}", number(loss)));
    }
    parts.push(format!("norm {}", number(last.total_norm)));
    parts.push(format!("coefficient {}", number(last.clip_coef)));
    let skipped = history.norms.skipped();
    if skipped > 0 {
        parts.push(format!("{skipped} skipped"));
    }
    if let Some(left) = left {
        parts.push(format!("{} left", time(left)));
    }
    parts.join(", ")
}

/// `speed` in steps a second.
fn time_left(step: u64, total: Option<u64>, speed: Option<f64>) -> Option<f64> {
    let left = total?.checked_sub(step)?;
    Some(left as f64 / speed.filter(|speed| *speed > 0.0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::MetricsRow;

    #[test]
    fn a_line_has_all_numbers_there_are() {
        let mut history = History::default();
        history.step(MetricsRow {
            step: 20,
            total_norm: 4.0,
            clip_coef: 0.25,
            ..MetricsRow::default()
        });
        let shown = line(20, &history, None, Some(2.0));
        assert_eq!(shown, "step 20: norm 4.000, coefficient 0.2500");
        history.step(MetricsRow {
            step: 40,
            loss: Some(0.5),
            total_norm: f64::NAN,
            skipped: true,
            ..MetricsRow::default()
        });
        let shown = line(40, &history, Some(100), Some(2.0));
        let expected = "step 40/100: loss 0.5000, norm NaN, coefficient 0, 1 skipped, 30 s left";
        assert_eq!(shown, expected);
    }
}
