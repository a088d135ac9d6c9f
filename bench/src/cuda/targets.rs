//! What the kernels should reach, and whether they did.

use crate::cuda::Row;
use crate::cuda::case::Impl;
use crate::cuda::task::{Start, Task};

/// A limit for a ratio of medians, on some sets.
pub(crate) struct Target {
    task: Task,
    sets: &'static [&'static str],
    kind: Kind,
    limit: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// How many times the floor's time ours may be, at most.
    TimesFloor,
    /// The same of what the norm adds to a step of SGD, which does not wait for it.
    InStepTimesFloor,
    /// How many times ours `PyTorch`'s has to be, at least.
    AheadOfPyTorch,
}

/// All targets.
pub(crate) const TARGETS: [Target; 5] = [
    Target {
        task: Task::TotalNorm,
        sets: &["B", "E"],
        kind: Kind::InStepTimesFloor,
        limit: 1.15,
    },
    Target {
        task: Task::TotalNorm,
        sets: &["B", "E"],
        kind: Kind::TimesFloor,
        limit: 1.15,
    },
    Target {
        task: Task::ClipAdamW,
        sets: &["B", "E"],
        kind: Kind::TimesFloor,
        limit: 1.2,
    },
    Target {
        task: Task::ClipAdamW,
        sets: &["B"],
        kind: Kind::AheadOfPyTorch,
        limit: 1.2,
    },
    Target {
        task: Task::ClipAdamW,
        sets: &["C", "D"],
        kind: Kind::AheadOfPyTorch,
        limit: 3.0,
    },
];

/// A target on one set in one dtype.
pub(crate) struct Verdict {
    pub(crate) what: String,
    /// From each of [`Start::ALL`]: the ratio, and whether it is within the limit. None where one of the two was not timed.
    pub(crate) ratios: [Option<(f64, bool)>; 2],
}

impl Target {
    pub(crate) fn verdicts(&self, rows: &[Row]) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for set in self.sets {
            for dtype in ["f32", "bf16"] {
                let ratios = Start::ALL.map(|start| {
                    let ratio =
                        self.ratio(&|task, rival| median_of(rows, start, set, dtype, task, rival))?;
                    Some((ratio, self.is_met_by(ratio)))
                });
                if ratios.iter().any(Option::is_some) {
                    let what = self.what(set, dtype);
                    verdicts.push(Verdict { what, ratios });
                }
            }
        }
        verdicts
    }

    fn ratio(&self, median: &dyn Fn(Task, &str) -> Option<f64>) -> Option<f64> {
        let ours = |task| median(task, Impl::CandleGradClip.name());
        let floor = || median(self.task, Impl::Floor.name());
        Some(match self.kind {
            Kind::TimesFloor => ours(self.task)? / floor()?,
            Kind::InStepTimesFloor => {
                let alone = median(Task::NoneSgd, Impl::StepAlone.name())?;
                (ours(Task::NoneSgd)? - alone) / floor()?
            }
            Kind::AheadOfPyTorch => median(self.task, "pytorch")? / ours(self.task)?,
        })
    }

    fn is_met_by(&self, ratio: f64) -> bool {
        match self.kind {
            Kind::TimesFloor | Kind::InStepTimesFloor => ratio <= self.limit,
            Kind::AheadOfPyTorch => ratio >= self.limit,
        }
    }

    fn what(&self, set: &str, dtype: &str) -> String {
        let (task, limit) = (self.task.name(), self.limit);
        let limit = match self.kind {
            Kind::TimesFloor => format!("at most {limit} times the floor"),
            Kind::InStepTimesFloor => format!("adds to a step at most {limit} times the floor"),
            Kind::AheadOfPyTorch => format!("pytorch takes at least {limit} times as long"),
        };
        format!("{set} {dtype} {task}: {limit}")
    }
}

fn median_of(
    rows: &[Row],
    start: Start,
    set: &str,
    dtype: &str,
    task: Task,
    rival: &str,
) -> Option<f64> {
    let row = rows.iter().find(|row| {
        let measured = &row.measured;
        row.start == start
            && measured.set == set
            && measured.dtype == dtype
            && measured.op == task.name()
            && measured.rival == rival
    });
    Some(row?.measured.median_ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Measured;

    fn row(start: Start, op: &'static str, rival: &str, median_ms: f64) -> Row {
        Row {
            start,
            measured: Measured {
                set: "B",
                dtype: "f32",
                op,
                rival: rival.to_owned(),
                calls: 1,
                median_ms,
                min_ms: median_ms,
                norm_error: None,
            },
            bytes_moved: 0,
            ratio_to_floor: f64::NAN,
        }
    }

    #[test]
    fn a_target_is_met_or_missed_and_nothing_is_said_of_what_was_not_timed() {
        let rows = [
            row(Start::Idle, "total_norm", "candle-grad-clip", 1.2),
            row(Start::Idle, "total_norm", "floor", 1.0),
            row(Start::Busy, "total_norm", "candle-grad-clip", 1.1),
            row(Start::Busy, "total_norm", "floor", 1.0),
            row(Start::Busy, "none_sgd", "candle-grad-clip", 4.0),
            row(
                Start::Busy,
                "none_sgd",
                "candle-grad-clip, step alone",
                2.75,
            ),
            row(Start::Busy, "clip_adamw", "candle-grad-clip", 1.0),
            row(Start::Busy, "clip_adamw", "pytorch", 1.5),
        ];
        let verdicts = TARGETS[1].verdicts(&rows);
        assert_eq!(verdicts.len(), 1);
        assert_eq!(
            verdicts[0].what,
            "B f32 total_norm: at most 1.15 times the floor"
        );
        assert_eq!(verdicts[0].ratios, [Some((1.2, false)), Some((1.1, true))]);
        let ratios = |target: &Target| target.verdicts(&rows)[0].ratios;
        assert_eq!(ratios(&TARGETS[0]), [None, Some((1.25, false))]);
        assert!(TARGETS[2].verdicts(&rows).is_empty());
        assert_eq!(ratios(&TARGETS[3]), [None, Some((1.5, true))]);
        assert!(TARGETS[4].verdicts(&rows).is_empty());
    }
}
