//! What a peer's operation should leave behind, in f64, and whether it did.

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde::Deserialize;

use crate::element::Element;
use crate::op::{CLIP_COEF, CLIP_VALUE, Op, PARAMS_SCALE, PARAMS_START, params_adamw, uniform};
use crate::oracle;

/// About how many elements a peer shows: see `peers/protocol.py`.
pub(crate) const SAMPLES: usize = 4096;
/// Relative. Frameworks sum f32 in f32: PyTorch's norm of A is 0.4 % too small.
pub(crate) const NORM_TOLERANCE: f64 = 1e-2;
/// Elements that a task works out.
const CHUNK: usize = 1 << 16;

/// What a peer shows of an operation's results: gradients, or parameters after two steps.
#[derive(Debug, Deserialize)]
pub(crate) struct Answer {
    /// Not all peers give it to their users.
    pub(crate) norm: Option<f64>,
    pub(crate) sum: f64,
    /// In f32, where JSON keeps every digit.
    pub(crate) samples: Vec<f32>,
}

/// An operation on the shared gradients of these lengths.
pub(crate) struct Question {
    op: Op,
    /// Where tensors start in the sequence of all elements, and where the last ends.
    starts: Vec<usize>,
    /// The norm that each tensor is clipped by: its own, or that of all.
    pub(crate) norms: Vec<f64>,
    pub(crate) max_norm: f64,
    /// Relative error that the norm may have.
    pub(crate) norm_tolerance: f64,
}

impl Question {
    /// With a limit for the norm of all, as [`crate::case::Case`] has it, or for that of each.
    pub(crate) fn new<E: Element>(shapes: &[Vec<usize>], op: Op, clips_each_tensor: bool) -> Self {
        let mut starts = vec![0];
        for shape in shapes {
            starts.push(starts[starts.len() - 1] + shape.iter().product::<usize>());
        }
        let mut powers: Vec<f64> = starts
            .windows(2)
            .map(|ends| sum(ends[0]..ends[1], |i| gradient::<E>(i).powi(2)))
            .collect();
        if !clips_each_tensor {
            let total = powers.iter().sum();
            powers.fill(total);
        }
        let norms: Vec<f64> = powers.into_iter().map(f64::sqrt).collect();
        let coef = if op == Op::ClipGradNormNoop {
            2.0
        } else {
            CLIP_COEF
        };
        // The smallest of all: every tensor is scaled, as in the other frameworks.
        let max_norm = coef * norms.iter().copied().fold(f64::INFINITY, f64::min);
        Self {
            op,
            starts,
            norms,
            max_norm,
            norm_tolerance: NORM_TOLERANCE,
        }
    }

    /// Compares all that was answered, and returns the relative error of the norm.
    pub(crate) fn check<E: Element>(&self, answer: &Answer) -> Result<Option<f64>> {
        let norm_error = self.check_samples::<E>(answer)?;
        let len = self.starts[self.starts.len() - 1];
        let expected = sum(0..len, |i| self.element::<E>(i).0);
        let rounding = 1e-12 * len as f64;
        let tolerance = rounding + sum(0..len, |i| self.element::<E>(i).1);
        ensure!(
            (answer.sum - expected).abs() <= tolerance,
            "its elements add up to {}, not {expected}",
            answer.sum
        );
        Ok(norm_error)
    }

    /// Compares the norm and the elements shown, and returns the relative error of the norm.
    pub(crate) fn check_samples<E: Element>(&self, answer: &Answer) -> Result<Option<f64>> {
        let norm_error = answer.norm.map(|norm| norm / self.norms[0] - 1.0);
        ensure!(
            norm_error.is_none_or(|error| error.abs() <= self.norm_tolerance),
            "its norm is {:?}, not {}",
            answer.norm,
            self.norms[0]
        );
        let len = self.starts[self.starts.len() - 1];
        let stride = (len / SAMPLES).max(1);
        ensure!(
            answer.samples.len() == len.div_ceil(stride),
            "it shows {} elements, not {}",
            answer.samples.len(),
            len.div_ceil(stride)
        );
        for (i, got) in (0..len).step_by(stride).zip(&answer.samples) {
            let (expected, tolerance) = self.element::<E>(i);
            ensure!(
                (f64::from(*got) - expected).abs() <= tolerance,
                "element {i} is {got}, not {expected}"
            );
        }
        Ok(norm_error)
    }

    /// What element `i` of all should be, and how far from it is not too far.
    fn element<E: Element>(&self, i: usize) -> (f64, f64) {
        let tensor = self.starts.partition_point(|start| *start <= i) - 1;
        let clip_coef = |scale: f64| (self.max_norm / (scale * self.norms[tensor] + 1e-6)).min(1.0);
        let g = gradient::<E>(i);
        let is_half = size_of::<E>() == 2;
        let rounding = if is_half {
            2f64.powi(-7)
        } else {
            2f64.powi(-22)
        };
        let steps = [clip_coef(1.0) * g, clip_coef(0.5) * 0.5 * g];
        let params = params_adamw();
        match self.op {
            Op::TotalNorm => (g, 0.0),
            Op::ClipGradValue => (g.clamp(-CLIP_VALUE, CLIP_VALUE), 0.0),
            Op::ClipGradNorm | Op::ClipGradNormNoop => {
                (steps[0], (rounding + self.norm_tolerance) * steps[0].abs())
            }
            Op::ClipSgd => {
                let start = parameter::<E>(i);
                let after = oracle::sgd(start, &steps, params.lr);
                // Where a step all but cancels a parameter, it is the parameter's rounding that counts.
                let largest = start.abs().max(after.abs());
                let of_step = (rounding + 2.0 * self.norm_tolerance) * params.lr;
                (after, rounding * largest + of_step * g.abs())
            }
            Op::ClipAdamW => {
                let after = oracle::adamw(parameter::<E>(i), &steps, &params);
                // A step without clipping would be 1.5 % shorter. Half moments have three digits; and where
                // gradients are tiny, frameworks differ in where they add `adam_eps`.
                let of_step = match (is_half, g.abs() < 1e-3) {
                    (_, true) => 2.0,
                    (true, _) => 0.1,
                    (false, _) => 2e-3,
                };
                (after, rounding * after.abs() + of_step * params.lr)
            }
        }
    }
}

fn gradient<E: Element>(i: usize) -> f64 {
    E::from_f64(uniform(i as u64)).to_f64()
}

fn parameter<E: Element>(i: usize) -> f64 {
    E::from_f64(PARAMS_SCALE * uniform(PARAMS_START + i as u64)).to_f64()
}

fn sum(range: std::ops::Range<usize>, value: impl Fn(usize) -> f64 + Sync) -> f64 {
    let ends: Vec<usize> = range.clone().step_by(CHUNK).collect();
    let parts = ends.into_par_iter().map(|start| {
        let end = (start + CHUNK).min(range.end);
        (start..end).map(&value).sum::<f64>()
    });
    parts.collect::<Vec<f64>>().iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a perfect peer answers.
    fn right(question: &Question) -> Answer {
        let len = question.starts[question.starts.len() - 1];
        Answer {
            norm: Some(question.norms[0]),
            sum: sum(0..len, |i| question.element::<f32>(i).0),
            samples: (0..len)
                .map(|i| question.element::<f32>(i).0 as f32)
                .collect(),
        }
    }

    #[test]
    fn right_answers_are_right_and_wrong_ones_are_found() {
        for op in Op::ALL {
            let question = Question::new::<f32>(&[vec![10], vec![7, 9]], op, false);
            assert!(question.check::<f32>(&right(&question)).is_ok(), "{op:?}");
            let mut wrong = right(&question);
            wrong.samples[20] *= 1.05;
            assert!(question.check::<f32>(&wrong).is_err(), "{op:?}");
            let mut wrong = right(&question);
            wrong.sum += 0.5;
            assert!(question.check::<f32>(&wrong).is_err(), "{op:?}");
            let mut wrong = right(&question);
            wrong.norm = Some(f64::NAN);
            assert!(question.check::<f32>(&wrong).is_err(), "{op:?}");
        }
    }

    #[test]
    fn steps_without_clipping_are_found() {
        for op in [Op::ClipAdamW, Op::ClipSgd] {
            let mut question = Question::new::<f32>(&[vec![100]], op, false);
            let max_norm = question.max_norm;
            question.max_norm = f64::INFINITY;
            let unclipped = right(&question);
            question.max_norm = max_norm;
            assert!(question.check::<f32>(&unclipped).is_err(), "{op:?}");
        }
    }

    #[test]
    fn a_limit_for_each_tensor_scales_each() {
        let shapes = [vec![4], vec![400]];
        let question = Question::new::<f32>(&shapes, Op::ClipGradNorm, true);
        let longest = question.norms[1];
        assert!(question.norms[0] < longest && question.max_norm < question.norms[0]);
        let clipped = sum(4..404, |i| question.element::<f32>(i).0.powi(2)).sqrt();
        assert!((clipped / question.max_norm - 1.0).abs() < 1e-6);
    }
}
