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
use crate::op::{
    CLIP_COEF, CLIP_VALUE, Impl, LR, OTHER_BYTES, Op, PARAMS_SCALE, PARAMS_START, params_adamw,
    uniform,
};
use crate::sets::Set;
use crate::steps::{self, Step};
use crate::{floor, oracle, paste_in};

/// Elements of each tensor that are checked.
const SAMPLE: usize = 64;

/// A gradient set in dtype `E`.
pub(crate) struct Case<E> {
    vars: Vec<Var>,
    /// The library and the floor work on the same memory.
    grads: GradStore,
    /// Pasted code puts new tensors into its store: it has one of its own.
    pasted: GradStore,
    /// What gradients are before each call.
    fresh: Vec<Vec<E>>,
    /// The optimizers of the operation at hand, if it is a step.
    steppers: Vec<(Impl, Box<dyn Step>)>,
    /// The floor's moments, if the operation at hand has some.
    moments: floor::Moments,
    total_norm: f64,
    /// Read before each call, so that no rival finds its gradients in the cache.
    other: Vec<u64>,
}

impl<E: Element> Case<E> {
    pub(crate) fn new(set: Set) -> Result<Self> {
        Self::with_shapes(&set.shapes(), set.is_cold())
    }

    /// Gradients of any shapes; whether they start out of the cache.
    pub(crate) fn with_shapes(shapes: &[Vec<usize>], is_cold: bool) -> Result<Self> {
        let mut start = 0;
        let (mut grads, mut pasted) = (GradStore::default(), GradStore::default());
        let (mut vars, mut fresh) = (Vec::new(), Vec::new());
        for shape in shapes {
            let var = Var::zeros(shape.as_slice(), E::DTYPE, &Device::Cpu)?;
            let indices = start..start + var.elem_count() as u64;
            start = indices.end;
            let values: Vec<E> = indices.map(|i| E::from_f64(uniform(i))).collect();
            for store in [&mut grads, &mut pasted] {
                let grad = Tensor::from_slice(&values, shape.as_slice(), &Device::Cpu)?;
                store.insert(&var, grad);
            }
            vars.push(var);
            fresh.push(values);
        }
        let total_norm = oracle::l2_norm(fresh.iter().flatten().map(|x| x.to_f64()));
        let other = if is_cold {
            vec![1; OTHER_BYTES / size_of::<u64>()]
        } else {
            Vec::new()
        };
        Ok(Self {
            vars,
            grads,
            pasted,
            fresh,
            steppers: Vec::new(),
            moments: floor::Moments::default(),
            total_norm,
            other,
        })
    }

    /// Makes ready for an operation: parameters and optimizers as at the start of training.
    pub(crate) fn prepare(&mut self, op: Op) -> Result<()> {
        self.steppers.clear();
        self.moments = floor::Moments::default();
        if !op.is_step() {
            return Ok(());
        }
        let vars: Vec<&Tensor> = self.vars.iter().map(Var::as_tensor).collect();
        with_elements::<E, _>(&vars, |elements| {
            let mut start = PARAMS_START;
            for slice in elements {
                for (i, x) in (start..).zip(slice.iter_mut()) {
                    *x = E::from_f64(PARAMS_SCALE * uniform(i));
                }
                start += slice.len() as u64;
            }
        })?;
        for rival in [Impl::CandleGradClip, Impl::PasteIn] {
            let stepper = steps::stepper(rival, op, &self.vars, self.max_norm(op))?;
            self.steppers
                .extend(stepper.map(|stepper| (rival, stepper)));
        }
        if op == Op::ClipAdamW {
            self.moments = floor::Moments::new(&self.vars);
        }
        Ok(())
    }

    /// One call: gradients as backward leaves them, then the clock, then a look at the norm.
    pub(crate) fn time(&mut self, rival: Impl, op: Op) -> Result<Duration> {
        self.refresh(rival)?;
        let max_norm = self.max_norm(op);
        let (grads, vars) = (&mut self.grads, self.vars.as_slice());
        let mut steppers = self.steppers.iter_mut();
        let stepper = steppers
            .find(|(of, _)| *of == rival)
            .map(|(_, stepper)| stepper);
        let start = Instant::now();
        let norm = match (rival, op) {
            (Impl::CandleGradClip | Impl::PasteIn, Op::ClipAdamW | Op::ClipSgd) => {
                let store = if rival == Impl::PasteIn {
                    &mut self.pasted
                } else {
                    grads
                };
                let stepper = stepper.context("the operation is not prepared")?;
                Some(stepper.step(store)?)
            }
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
            (Impl::Floor, Op::ClipAdamW | Op::ClipSgd) => {
                let vars: Vec<&Tensor> = self.vars.iter().map(Var::as_tensor).collect();
                let store = &self.grads;
                let grads: Vec<&Tensor> = vars.iter().filter_map(|var| store.get(var)).collect();
                return floor::time_step::<E>(&grads, &vars, &mut self.moments);
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

    /// Takes two steps from the start, and compares elements of every parameter with what they should be.
    ///
    /// `AdamW`'s first step is the same for any coefficient. The second shows it: half the gradient is below the
    /// limit.
    fn check_steps(&mut self, rival: Impl, op: Op) -> Result<()> {
        if rival == Impl::Floor {
            return Ok(()); // it steps nowhere in particular
        }
        self.prepare(op)?;
        self.time(rival, op)?;
        let half: Vec<Tensor> = self
            .tensors(Impl::CandleGradClip)?
            .into_iter()
            .zip(&self.fresh)
            .map(|(grad, fresh)| Tensor::from_slice(fresh, grad.shape(), grad.device())? * 0.5)
            .collect::<candle_core::Result<_>>()?;
        let mut grads = GradStore::default();
        for (var, half) in self.vars.iter().zip(half) {
            grads.insert(var, half);
        }
        for (of, stepper) in &mut self.steppers {
            if *of == rival {
                stepper.step(&mut grads)?;
            }
        }
        let clip_coef = self.max_norm(op) / (self.total_norm + 1e-6);
        let expected = |start: f64, g: f64| match op {
            Op::ClipSgd => oracle::sgd(start, &[g * clip_coef, g / 2.0], LR),
            _ => oracle::adamw(start, &[g * clip_coef, g / 2.0], &params_adamw()),
        };
        let mut start = PARAMS_START;
        for ((var, fresh), tensor) in self.vars.iter().zip(&self.fresh).zip(0..) {
            let after = var.flatten_all()?.to_vec1::<E>()?;
            for i in samples(fresh.len()) {
                let first = E::from_f64(PARAMS_SCALE * uniform(start + i as u64)).to_f64();
                let (expected, got) = (expected(first, fresh[i].to_f64()), after[i].to_f64());
                ensure!(
                    (got - expected).abs()
                        <= step_tolerance::<E>(rival, first.abs().max(expected.abs())),
                    "{} of {}: element {i} of tensor {tensor} is {got}, not {expected}",
                    op.name(),
                    rival.name()
                );
            }
            start += fresh.len() as u64;
        }
        Ok(())
    }

    /// Calls once, and compares elements of every tensor with what they should be.
    pub(crate) fn check(&mut self, rival: Impl, op: Op) -> Result<()> {
        if op.is_step() {
            return self.check_steps(rival, op);
        }
        self.time(rival, op)?;
        let clip_coef = (self.max_norm(op) / (self.total_norm + 1e-6)).min(1.0);
        let expected = |x: f64| match (rival, op) {
            (_, Op::TotalNorm | Op::ClipGradNormNoop) => x,
            (Impl::Floor, _) => x * CLIP_COEF,
            (_, Op::ClipGradNorm) => x * clip_coef,
            _ => x.clamp(-CLIP_VALUE, CLIP_VALUE),
        };
        let is_exact = matches!(op, Op::TotalNorm | Op::ClipGradNormNoop)
            || (op == Op::ClipGradValue && rival != Impl::Floor);
        let tolerance = if is_exact { 0.0 } else { tolerance::<E>(rival) };
        let wrong =
            with_elements::<E, _>(&self.tensors(rival)?, |elements| {
                elements.iter().zip(&self.fresh).enumerate().find_map(
                    |(tensor, (after, before))| {
                        samples(before.len()).find_map(|i| {
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

/// Which elements of a tensor are checked.
fn samples(len: usize) -> impl Iterator<Item = usize> {
    let last = len - 1;
    (0..=last).step_by((len / SAMPLE).max(1)).chain([last])
}

/// How far a parameter may be from the expected one after two steps: a rounding each, and a few of its moments.
fn step_tolerance<E: Element>(rival: Impl, largest: f64) -> f64 {
    let moments = match (rival, size_of::<E>()) {
        // candle keeps moments in the parameters' dtype: 8 bits of the step are right.
        (Impl::PasteIn, 2) => 0.1,
        (Impl::PasteIn, _) => 2e-2, // of its norm
        _ => 1e-4,
    };
    2.0 * tolerance::<E>(Impl::Floor) * (largest + LR) + moments * LR
}

/// Relative error that a norm may have. Pasted code sums f32 in f32.
fn norm_tolerance(rival: Impl) -> f64 {
    match rival {
        Impl::PasteIn => 1e-2,
        Impl::CandleGradClip | Impl::Floor => 1e-12,
    }
}

/// Relative error that a scaled element may have: a rounding, and its norm's.
fn tolerance<E: Element>(rival: Impl) -> f64 {
    let rounding = match size_of::<E>() {
        2 => 2f64.powi(-8),
        4 => 2f64.powi(-22),
        _ => 2f64.powi(-51),
    };
    rounding + norm_tolerance(rival)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn every_rival_does_every_operation_right() -> Result<()> {
        let mut case = Case::<f32>::new(Set::D)?;
        for op in Op::ALL {
            for rival in Impl::ALL {
                case.check(rival, op)?;
            }
        }
        let mut case = Case::<bf16>::new(Set::D)?;
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
