//! One gradient set in one dtype: the rivals' gradients, how each does an operation, and whether
//! what it did is right.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use candle_grad_clip::NormType;
use rayon::prelude::*;

use crate::element::Element;
use crate::memory::with_elements;
use crate::sets::Set;
use crate::{floor, oracle, paste_in};

/// Elements outside of `[-CLIP_VALUE, CLIP_VALUE]` are one in eight.
const CLIP_VALUE: f64 = 0.875;
/// What a norm clip scales by.
const CLIP_COEF: f64 = 0.9;
/// Read before a call on a set that starts cold: four times a large cache.
const OTHER_BYTES: usize = 128 << 20;
/// Elements of each tensor that are checked.
const SAMPLE: usize = 64;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    TotalNorm,
    ClipGradNorm,
    ClipGradNormNoop,
    ClipGradValue,
}

impl Op {
    pub(crate) const ALL: [Self; 4] = [
        Self::TotalNorm,
        Self::ClipGradNorm,
        Self::ClipGradNormNoop,
        Self::ClipGradValue,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::TotalNorm => "total_norm",
            Self::ClipGradNorm => "clip_grad_norm",
            Self::ClipGradNormNoop => "clip_grad_norm_noop",
            Self::ClipGradValue => "clip_grad_value",
        }
    }
}

/// Who does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Impl {
    CandleGradClip,
    PasteIn,
    Floor,
}

impl Impl {
    pub(crate) const ALL: [Self; 3] = [Self::CandleGradClip, Self::PasteIn, Self::Floor];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::CandleGradClip => "candle-grad-clip",
            Self::PasteIn => "paste-in",
            Self::Floor => "floor",
        }
    }
}

/// A gradient set in dtype `E`.
pub(crate) struct Case<E> {
    vars: Vec<Var>,
    /// The library and the floor work on the same memory.
    grads: GradStore,
    /// Pasted code puts new tensors into its store: it has one of its own.
    pasted: GradStore,
    /// What gradients are before each call.
    fresh: Vec<Vec<E>>,
    total_norm: f64,
    /// Read before each call, so that no rival finds its gradients in the cache.
    other: Vec<u64>,
}

impl<E: Element> Case<E> {
    pub(crate) fn new(set: Set) -> Result<Self> {
        let mut rng = fastrand::Rng::with_seed(1);
        let (mut grads, mut pasted) = (GradStore::default(), GradStore::default());
        let (mut vars, mut fresh) = (Vec::new(), Vec::new());
        for shape in set.shapes() {
            let var = Var::zeros(shape.as_slice(), E::DTYPE, &Device::Cpu)?;
            let values: Vec<E> = (0..var.elem_count())
                .map(|_| E::from_f64(2.0 * rng.f64() - 1.0))
                .collect();
            for store in [&mut grads, &mut pasted] {
                let grad = Tensor::from_slice(&values, shape.as_slice(), &Device::Cpu)?;
                store.insert(&var, grad);
            }
            vars.push(var);
            fresh.push(values);
        }
        let total_norm = oracle::l2_norm(fresh.iter().flatten().map(|x| x.to_f64()));
        let other = if set.is_cold() {
            vec![1; OTHER_BYTES / size_of::<u64>()]
        } else {
            Vec::new()
        };
        Ok(Self {
            vars,
            grads,
            pasted,
            fresh,
            total_norm,
            other,
        })
    }

    /// One call: gradients as backward leaves them, then the clock, then a look at the norm.
    pub(crate) fn time(&mut self, rival: Impl, op: Op) -> Result<Duration> {
        self.refresh(rival)?;
        let max_norm = self.max_norm(op);
        let (grads, vars) = (&mut self.grads, self.vars.as_slice());
        let start = Instant::now();
        let norm = match (rival, op) {
            (Impl::CandleGradClip, Op::TotalNorm) => {
                Some(candle_grad_clip::total_norm(grads, vars, NormType::L2)?)
            }
            (Impl::CandleGradClip, Op::ClipGradNorm | Op::ClipGradNormNoop) => {
                Some(candle_grad_clip::clip_grad_norm(grads, vars, max_norm)?)
            }
            (Impl::CandleGradClip, Op::ClipGradValue) => {
                candle_grad_clip::clip_grad_value(grads, vars, CLIP_VALUE)?;
                None
            }
            (Impl::PasteIn, Op::TotalNorm) => Some(paste_in::total_norm(&self.pasted, vars)?),
            (Impl::PasteIn, Op::ClipGradNorm | Op::ClipGradNormNoop) => {
                Some(paste_in::clip_grad_norm(&mut self.pasted, vars, max_norm)?)
            }
            (Impl::PasteIn, Op::ClipGradValue) => {
                paste_in::clip_grad_value(&mut self.pasted, vars, CLIP_VALUE)?;
                None
            }
            (Impl::Floor, _) => return floor::time::<E>(op, &self.tensors(rival)?, CLIP_COEF),
        };
        let elapsed = start.elapsed();
        if let Some(norm) = norm {
            let error = (norm / self.total_norm - 1.0).abs();
            ensure!(
                error <= norm_tolerance(rival),
                "{} gives a norm of {norm}, not {}",
                rival.name(),
                self.total_norm
            );
        }
        Ok(elapsed)
    }

    /// Calls once, and compares elements of every tensor with what they should be.
    pub(crate) fn check(&mut self, rival: Impl, op: Op) -> Result<()> {
        self.time(rival, op)?;
        let clip_coef = (self.max_norm(op) / (self.total_norm + 1e-6)).min(1.0);
        let expected = |x: f64| match (rival, op) {
            (_, Op::TotalNorm | Op::ClipGradNormNoop) => x,
            (Impl::Floor, _) => x * CLIP_COEF,
            (_, Op::ClipGradNorm) => x * clip_coef,
            (_, Op::ClipGradValue) => x.clamp(-CLIP_VALUE, CLIP_VALUE),
        };
        let is_exact = matches!(op, Op::TotalNorm | Op::ClipGradNormNoop)
            || (op == Op::ClipGradValue && rival != Impl::Floor);
        let tolerance = if is_exact { 0.0 } else { tolerance::<E>(rival) };
        let wrong =
            with_elements::<E, _>(&self.tensors(rival)?, |elements| {
                elements.iter().zip(&self.fresh).enumerate().find_map(
                    |(tensor, (after, before))| {
                        let step = (before.len() / SAMPLE).max(1);
                        let last = before.len() - 1;
                        (0..=last).step_by(step).chain([last]).find_map(|i| {
                            let (expected, got) = (expected(before[i].to_f64()), after[i].to_f64());
                            let right = (got - expected).abs() <= tolerance * expected.abs();
                            (!right).then_some((tensor, i, expected, got))
                        })
                    },
                )
            })?;
        if let Some((tensor, i, expected, got)) = wrong {
            bail!(
                "{} of {}: element {i} of tensor {tensor} is {got}, not {expected}",
                op.name(),
                rival.name()
            );
        }
        Ok(())
    }

    fn max_norm(&self, op: Op) -> f64 {
        match op {
            Op::ClipGradNormNoop => 2.0 * self.total_norm,
            _ => CLIP_COEF * self.total_norm,
        }
    }

    fn tensors(&self, rival: Impl) -> Result<Vec<&Tensor>> {
        let store = match rival {
            Impl::PasteIn => &self.pasted,
            Impl::CandleGradClip | Impl::Floor => &self.grads,
        };
        self.vars
            .iter()
            .map(|var| store.get(var).context("a gradient is gone"))
            .collect()
    }

    /// Writes the gradients anew, as a backward pass does, and then reads other memory, as a
    /// program does whose model is larger than the cache.
    fn refresh(&self, rival: Impl) -> Result<()> {
        with_elements::<E, _>(&self.tensors(rival)?, |elements| {
            let large = |slice: &[E]| slice.len() > (1 << 16);
            let (big, small): (Vec<_>, Vec<_>) = elements
                .into_iter()
                .zip(&self.fresh)
                .partition(|(target, _)| large(target));
            for (target, source) in small {
                target.copy_from_slice(source);
            }
            for (target, source) in big {
                let chunks = target
                    .par_chunks_mut(1 << 16)
                    .zip(source.par_chunks(1 << 16));
                chunks.for_each(|(target, source)| target.copy_from_slice(source));
            }
        })?;
        let read: u64 = self
            .other
            .par_chunks(1 << 16)
            .map(|part| part.iter().sum::<u64>())
            .sum();
        ensure!(
            read == self.other.len() as u64,
            "the other memory has changed"
        );
        Ok(())
    }
}

/// Relative error that a norm may have. Pasted code sums f32 in f32.
fn norm_tolerance(rival: Impl) -> f64 {
    match rival {
        Impl::PasteIn => 1e-2,
        Impl::CandleGradClip | Impl::Floor => 1e-12,
    }
}

/// Relative error that a scaled element may have: a rounding, and for pasted code its norm's.
fn tolerance<E: Element>(rival: Impl) -> f64 {
    let rounding = match size_of::<E>() {
        2 => 2f64.powi(-8),
        4 => 2f64.powi(-22),
        _ => 2f64.powi(-51),
    };
    match rival {
        Impl::PasteIn => rounding + norm_tolerance(rival),
        Impl::CandleGradClip | Impl::Floor => rounding,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rival_does_every_operation_right() -> Result<()> {
        let mut case = Case::<f32>::new(Set::D)?;
        for op in Op::ALL {
            for rival in Impl::ALL {
                case.check(rival, op)?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_wrong_answer_is_found() -> Result<()> {
        let mut case = Case::<f32>::new(Set::D)?;
        case.total_norm *= 1.0 + 1e-9;
        assert!(case.check(Impl::CandleGradClip, Op::TotalNorm).is_err());
        let mut case = Case::<f32>::new(Set::D)?;
        case.time(Impl::CandleGradClip, Op::ClipGradValue)?;
        case.fresh[7][0] = 1000.0;
        assert!(case.check(Impl::Floor, Op::TotalNorm).is_ok());
        assert!(case.check(Impl::PasteIn, Op::ClipGradNorm).is_err());
        Ok(())
    }
}
