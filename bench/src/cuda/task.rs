//! What is timed on a GPU.

use std::fmt;

use crate::answer::Question;
use crate::element::Element;
use crate::op::Op;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    TotalNorm,
    ClipGradNorm,
    ClipAdamW,
    ClipSgd,
    /// Measures and steps: what a step with clipping is compared with.
    NoneSgd,
}

impl Task {
    pub(crate) const ALL: [Self; 5] = [
        Self::TotalNorm,
        Self::ClipGradNorm,
        Self::ClipAdamW,
        Self::ClipSgd,
        Self::NoneSgd,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::NoneSgd => "none_sgd",
            _ => self.op().name(),
        }
    }

    /// The operation of the CPU's benchmark that has the same answers, but for the limit.
    pub(crate) fn op(self) -> Op {
        match self {
            Self::TotalNorm => Op::TotalNorm,
            Self::ClipGradNorm => Op::ClipGradNorm,
            Self::ClipAdamW => Op::ClipAdamW,
            Self::ClipSgd | Self::NoneSgd => Op::ClipSgd,
        }
    }

    /// The right answers for gradients of these shapes.
    pub(crate) fn question<E: Element>(self, shapes: &[Vec<usize>]) -> Question {
        let mut question = Question::new::<E>(shapes, self.op(), false);
        if self == Self::NoneSgd {
            question.max_norm = f64::INFINITY;
        }
        question
    }

    /// The least that has to be read and written: gradients once for the norm, then again with all that changes.
    /// Moments are two f32 a parameter.
    pub(crate) fn bytes_moved<E: Element>(self, elements: usize) -> usize {
        let moments = 2 * size_of::<f32>();
        let bytes = match self {
            Self::TotalNorm => size_of::<E>(),
            Self::ClipGradNorm => 3 * size_of::<E>(),
            Self::ClipAdamW => 4 * size_of::<E>() + 2 * moments,
            Self::ClipSgd | Self::NoneSgd => 4 * size_of::<E>(),
        };
        elements * bytes
    }
}

/// In which state a call finds the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Start {
    /// It has nothing to do: what the host does before its first launch, and between launches, counts.
    Idle,
    /// It has a millisecond of work left, as after a backward pass: what the host does meanwhile counts nothing.
    Busy,
}

impl Start {
    pub(crate) const ALL: [Self; 2] = [Self::Idle, Self::Busy];
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Busy => "busy",
        })
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn a_clipped_step_of_adamw_moves_eight_words() {
        let words = |task: Task| task.bytes_moved::<f32>(1000) / 4000;
        assert_eq!(Task::ALL.map(words), [1, 3, 8, 4, 4]);
        let bytes = |task: Task| task.bytes_moved::<bf16>(1000) / 1000;
        assert_eq!(Task::ALL.map(bytes), [2, 6, 24, 8, 8]);
    }
}
