//! What an operation should leave behind, in f64, and whether it did.

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Deserializer};

use crate::element::Element;
use crate::op::{
    CLIP_COEF, CLIP_VALUE, Impl, Op, PARAMS_SCALE, PARAMS_START, params_adamw, uniform,
};
use crate::oracle;

/// About how many elements a peer shows: see `peers/protocol.py`.
const SAMPLES: usize = 4096;
/// The same of each tensor, for rivals of this program.
const SAMPLES_OF_TENSOR: usize = 64;
/// Relative. Frameworks sum f32 in f32: PyTorch's norm of A is 0.4 % too small.
pub(crate) const NORM_TOLERANCE: f64 = 1e-2;
/// Elements that a task works out.
const CHUNK: usize = 1 << 16;

/// What a rival shows of an operation's results: gradients, or parameters after two steps.
#[derive(Debug, Deserialize)]
pub(crate) struct Answer {
    /// Not all peers give it to their users.
    pub(crate) norm: Option<f64>,
    pub(crate) sum: f64,
    #[serde(deserialize_with = "f32s")]
    pub(crate) samples: Vec<f64>,
}

/// Peers show f32, of which JSON keeps every digit.
fn f32s<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
    let samples = Vec::<f32>::deserialize(from)?;
    Ok(samples.into_iter().map(f64::from).collect())
}

/// An operation on the shared gradients of these lengths, and what is right.
#[derive(Clone)]
pub(crate) struct Question {
    pub(crate) op: Op,
    /// Where tensors start in the sequence of all elements, and where the last ends.
    starts: Vec<usize>,
    /// A number in the dtype at hand.
    rounded: fn(f64) -> f64,
    /// The relative error that an operation in this dtype may have.
    rounding: f64,
    /// The norm that each tensor is clipped by: its own, or that of all.
    pub(crate) norms: Vec<f64>,
    pub(crate) max_norm: f64,
    /// Relative error that the norm may have.
    norm_tolerance: f64,
    /// Error that two steps of `AdamW` may have, as a share of the learning rate.
    step_tolerance: f64,
    /// The rival of this program that is asked: it shows elements of every tensor, and nothing is
    /// excused.
    rival: Option<Impl>,
    /// Whether the sum of all elements is compared, too.
    pub(crate) sums: bool,
}

impl Question {
    /// With a limit for the norm of all, or for that of each.
    pub(crate) fn new<E: Element>(shapes: &[Vec<usize>], clips_each_tensor: bool) -> Self {
        let mut starts = vec![0];
        for shape in shapes {
            starts.push(starts[starts.len() - 1] + shape.iter().product::<usize>());
        }
        let rounded = |x: f64| E::from_f64(x).to_f64();
        let mut powers: Vec<f64> = starts
            .windows(2)
            .map(|ends| sum(ends[0]..ends[1], |i| rounded(uniform(i as u64)).powi(2)))
            .collect();
        if !clips_each_tensor {
            let total = oracle::sum(powers.iter().copied());
            powers.fill(total);
        }
        let (rounding, step_tolerance) = match size_of::<E>() {
            2 => (2f64.powi(-8), 0.1), // half moments have three digits
            4 => (2f64.powi(-22), 2e-3),
            _ => (2f64.powi(-51), 2e-3),
        };
        Self {
            op: Op::TotalNorm,
            starts,
            rounded,
            rounding,
            norms: powers.into_iter().map(f64::sqrt).collect(),
            max_norm: f64::INFINITY,
            norm_tolerance: NORM_TOLERANCE,
            // A step without clipping would be 1.5 % shorter.
            step_tolerance,
            rival: None,
            sums: true,
        }
    }

    /// The same for another operation.
    pub(crate) fn about(&self, op: Op) -> Self {
        let coef = match op {
            Op::ClipGradNormNoop => 2.0,
            #[cfg(feature = "cuda")]
            Op::NoneSgd => f64::INFINITY,
            _ => CLIP_COEF,
        };
        // The smallest of all: every tensor is scaled, as in the other frameworks.
        let max_norm = coef * self.norms.iter().copied().fold(f64::INFINITY, f64::min);
        Self {
            op,
            max_norm,
            ..self.clone()
        }
    }

    /// The same for a rival of this program.
    pub(crate) fn here(self, rival: Impl, norm_tolerance: f64, step_tolerance: f64) -> Self {
        Self {
            norm_tolerance,
            step_tolerance,
            rival: Some(rival),
            sums: false,
            ..self
        }
    }

    /// What the gradients are scaled by.
    pub(crate) fn clip_coef(&self) -> f64 {
        self.coef_of(0, 1.0)
    }

    fn coef_of(&self, tensor: usize, scale: f64) -> f64 {
        (self.max_norm / (scale * self.norms[tensor] + 1e-6)).min(1.0)
    }

    /// Which elements are shown.
    pub(crate) fn places(&self) -> Vec<usize> {
        let every = |start: usize, end: usize, samples: usize| {
            (start..end).step_by(((end - start) / samples).max(1))
        };
        if self.rival.is_none() {
            return every(0, self.len(), SAMPLES).collect();
        }
        let mut places = Vec::new();
        for ends in self.starts.windows(2) {
            places.extend(every(ends[0], ends[1], SAMPLES_OF_TENSOR).chain([ends[1] - 1]));
            places.dedup();
        }
        places
    }

    fn len(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// Compares all that was answered, and returns the relative error of the norm.
    pub(crate) fn check(&self, answer: &Answer) -> Result<Option<f64>> {
        let norm_error = answer.norm.map(|norm| norm / self.norms[0] - 1.0);
        ensure!(
            norm_error.is_none_or(|error| error.abs() <= self.norm_tolerance),
            "its norm is {:?}, not {}",
            answer.norm,
            self.norms[0]
        );
        let places = self.places();
        ensure!(
            answer.samples.len() == places.len(),
            "it shows {} elements, not {}",
            answer.samples.len(),
            places.len()
        );
        for (i, got) in places.into_iter().zip(&answer.samples) {
            let (expected, tolerance) = self.element(i);
            ensure!(
                (got - expected).abs() <= tolerance,
                "element {i} is {got}, not {expected}"
            );
        }
        if self.sums {
            let len = self.len();
            let expected = sum(0..len, |i| self.element(i).0);
            let rounding = 1e-12 * len as f64;
            let tolerance = rounding + sum(0..len, |i| self.element(i).1);
            ensure!(
                (answer.sum - expected).abs() <= tolerance,
                "its elements add up to {}, not {expected}",
                answer.sum
            );
        }
        Ok(norm_error)
    }

    /// What element `i` of all should be, and how far from it is not too far.
    fn element(&self, i: usize) -> (f64, f64) {
        let tensor = self.starts.partition_point(|start| *start <= i) - 1;
        let g = (self.rounded)(uniform(i as u64));
        let start = (self.rounded)(PARAMS_SCALE * uniform(PARAMS_START + i as u64));
        let steps = [
            self.coef_of(tensor, 1.0) * g,
            self.coef_of(tensor, 0.5) * 0.5 * g,
        ];
        let params = params_adamw();
        let scaled = (
            steps[0],
            (self.rounding + self.norm_tolerance) * steps[0].abs(),
        );
        match self.op {
            Op::TotalNorm => (g, 0.0),
            Op::ClipGradNormNoop if self.rival.is_some() => (g, 0.0),
            // It scales where the others clamp.
            Op::ClipGradValue if self.rival == Some(Impl::Floor) => scaled,
            Op::ClipGradValue => (g.clamp(-CLIP_VALUE, CLIP_VALUE), 0.0),
            Op::ClipGradNorm | Op::ClipGradNormNoop => scaled,
            Op::ClipAdamW => {
                let after = oracle::adamw(start, &steps, &params);
                // Where gradients are tiny, frameworks differ in where they add `adam_eps`.
                let is_excused = self.rival.is_none() && g.abs() < 1e-3;
                let of_step = if is_excused { 2.0 } else { self.step_tolerance };
                let largest = start.abs().max(after.abs()) + params.lr;
                (after, 2.0 * self.rounding * largest + of_step * params.lr)
            }
            Op::ClipSgd => self.after_sgd(start, &steps, g),
            #[cfg(feature = "cuda")]
            Op::NoneSgd => self.after_sgd(start, &steps, g),
        }
    }

    fn after_sgd(&self, start: f64, steps: &[f64], g: f64) -> (f64, f64) {
        let lr = params_adamw().lr;
        let after = oracle::sgd(start, steps, lr);
        // Where a step all but cancels a parameter, it is the parameter's rounding that counts.
        let largest = start.abs().max(after.abs());
        let of_step = 2.0 * (self.rounding + self.norm_tolerance) * lr;
        (after, 2.0 * self.rounding * largest + of_step * g.abs())
    }
}

fn sum(range: std::ops::Range<usize>, value: impl Fn(usize) -> f64 + Sync) -> f64 {
    let ends: Vec<usize> = range.clone().step_by(CHUNK).collect();
    let parts = ends.into_par_iter().map(|start| {
        let end = (start + CHUNK).min(range.end);
        oracle::sum((start..end).map(&value))
    });
    oracle::sum(parts.collect::<Vec<f64>>().into_iter())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a perfect peer answers.
    fn right(question: &Question) -> Answer {
        let len = question.starts[question.starts.len() - 1];
        Answer {
            norm: Some(question.norms[0]),
            sum: sum(0..len, |i| question.element(i).0),
            samples: (0..len).map(|i| question.element(i).0).collect(),
        }
    }

    #[test]
    fn right_answers_are_right_and_wrong_ones_are_found() {
        for op in Op::ALL {
            let question = Question::new::<f32>(&[vec![10], vec![7, 9]], false).about(op);
            assert!(question.check(&right(&question)).is_ok(), "{op:?}");
            let mut wrong = right(&question);
            wrong.samples[20] *= 1.05;
            assert!(question.check(&wrong).is_err(), "{op:?}");
            let mut wrong = right(&question);
            wrong.sum += 0.5;
            assert!(question.check(&wrong).is_err(), "{op:?}");
            let mut wrong = right(&question);
            wrong.norm = Some(f64::NAN);
            assert!(question.check(&wrong).is_err(), "{op:?}");
        }
    }

    #[test]
    fn steps_without_clipping_are_found() {
        for op in [Op::ClipAdamW, Op::ClipSgd] {
            let mut question = Question::new::<f32>(&[vec![100]], false).about(op);
            let max_norm = question.max_norm;
            question.max_norm = f64::INFINITY;
            let unclipped = right(&question);
            question.max_norm = max_norm;
            assert!(question.check(&unclipped).is_err(), "{op:?}");
        }
    }

    #[test]
    fn a_limit_for_each_tensor_scales_each() {
        let shapes = [vec![4], vec![400]];
        let question = Question::new::<f32>(&shapes, true).about(Op::ClipGradNorm);
        let longest = question.norms[1];
        assert!(question.norms[0] < longest && question.max_norm < question.norms[0]);
        let clipped = sum(4..404, |i| question.element(i).0.powi(2)).sqrt();
        assert!((clipped / question.max_norm - 1.0).abs() < 1e-6);
    }

    #[test]
    fn of_every_tensor_some_elements_are_shown() {
        let question = Question::new::<f32>(&[vec![1], vec![3], vec![100, 100]], false);
        assert_eq!(question.places().len(), 5002);
        let here = question.here(Impl::Floor, 0.0, 0.0).places();
        assert_eq!(here[..4], [0, 1, 2, 3]);
        assert_eq!(here.last(), Some(&10_003));
        assert!(here.is_sorted() && here.len() == 4 + 66, "{}", here.len());
    }

    #[test]
    fn what_a_peer_shows_is_f32() -> Result<()> {
        let answer: Answer = serde_json::from_str(r#"{"sum": 0, "samples": [0.1]}"#)?;
        assert_eq!(
            (answer.norm, answer.samples),
            (None, vec![f64::from(0.1f32)])
        );
        Ok(())
    }
}
