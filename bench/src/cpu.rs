//! Gradients in this machine's memory, and its clock.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;

use crate::calls::Call;
use crate::case::{Case, Machine};
use crate::element::Element;
use crate::floor;
use crate::memory::with_elements;
use crate::op::{Impl, OTHER_BYTES, Op};
use crate::sets::Set;

/// The gradients of a set on the CPU.
pub(crate) struct Cpu<E> {
    /// The library and the floor work on the same memory.
    grads: GradStore,
    /// Pasted code puts new tensors into its store: it has its own.
    pasted: GradStore,
    /// What gradients are before each call.
    fresh: Vec<Vec<E>>,
    /// The floor's moments, if the operation at hand has some.
    moments: floor::Moments,
    other: Other,
}

/// Other memory, which is read before each call, so that no rival finds its gradients in the cache.
pub(crate) struct Other(Vec<u64>);

impl Other {
    /// Empty where gradients never leave the cache.
    pub(crate) fn new(is_cold: bool) -> Self {
        let bytes = if is_cold { OTHER_BYTES } else { 0 };
        Self(vec![1; bytes / size_of::<u64>()])
    }

    pub(crate) fn read(&self) -> Result<()> {
        let parts = self.0.par_chunks(1 << 16);
        let read: u64 = parts.map(|part| part.iter().sum::<u64>()).sum();
        ensure!(read == self.0.len() as u64, "the other memory has changed");
        Ok(())
    }
}

impl<E: Element> Case<E, Cpu<E>> {
    pub(crate) fn of_set(set: Set) -> Result<Self> {
        Self::new(set.shapes(), Cpu::new(set.is_cold()))
    }
}

impl<E: Element> Cpu<E> {
    /// Whether gradients start out of the cache.
    pub(crate) fn new(is_cold: bool) -> Self {
        Self {
            grads: GradStore::default(),
            pasted: GradStore::default(),
            fresh: Vec::new(),
            moments: floor::Moments::default(),
            other: Other::new(is_cold),
        }
    }

    fn tensors(&self, rival: Impl, vars: &[Var]) -> Result<Vec<&Tensor>> {
        let store = self.grads(rival);
        vars.iter()
            .map(|var| store.get(var).context("a gradient is gone"))
            .collect()
    }

    /// Writes the gradients anew, as a backward pass does, and then reads other memory, as a
    /// program does whose model is larger than the cache.
    fn refresh(&self, rival: Impl, vars: &[Var]) -> Result<()> {
        with_elements::<E, _>(&self.tensors(rival, vars)?, |elements| {
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
        self.other.read()
    }
}

impl<E: Element> Machine<E> for Cpu<E> {
    const NORM_TOLERANCE: f64 = 1e-12;
    const STEP_TOLERANCE: f64 = 1e-4;

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn add(&mut self, var: &Var, values: Vec<E>) -> Result<()> {
        for store in [&mut self.grads, &mut self.pasted] {
            let grad = Tensor::from_slice(&values, var.dims(), &Device::Cpu)?;
            store.insert(var, grad);
        }
        self.fresh.push(values);
        Ok(())
    }

    fn fresh(&self, index: usize, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.fresh[index], shape, &Device::Cpu)?)
    }

    fn grads(&self, rival: Impl) -> &GradStore {
        match rival {
            Impl::PasteIn => &self.pasted,
            _ => &self.grads,
        }
    }

    fn prepare(&mut self, op: Op, vars: &[Var]) {
        self.moments = floor::Moments::default();
        if op == Op::ClipAdamW {
            self.moments = floor::Moments::new(vars);
        }
    }

    fn time(
        &mut self,
        rival: Impl,
        _: Op,
        vars: &[Var],
        call: &mut Call,
    ) -> Result<(f64, Option<f64>)> {
        self.refresh(rival, vars)?;
        let store = match rival {
            Impl::PasteIn => &mut self.pasted,
            _ => &mut self.grads,
        };
        let start = Instant::now();
        let norm = call(store)?.value()?;
        let elapsed = start.elapsed();
        Ok((elapsed.as_secs_f64() * 1e3, norm))
    }

    fn time_floor(&mut self, op: Op, vars: &[Var], coef: f64) -> Result<f64> {
        self.refresh(Impl::Floor, vars)?;
        let elapsed = if op.is_step() {
            let params: Vec<&Tensor> = vars.iter().map(Var::as_tensor).collect();
            let store = &self.grads;
            let grads: Vec<&Tensor> = params.iter().filter_map(|var| store.get(var)).collect();
            floor::time_step::<E>(&grads, &params, &mut self.moments)?
        } else {
            floor::time::<E>(op, &self.tensors(Impl::Floor, vars)?, coef)?
        };
        Ok(elapsed.as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::rival::check;

    fn check_all<E: Element>(rivals: &[Impl], ops: &[Op]) -> Result<()> {
        let mut case = Case::<E, _>::of_set(Set::D)?;
        for op in ops {
            for rival in rivals {
                let what = || format!("{op:?} {rival:?}");
                check(&mut rival.clone(), &mut case, *op).with_context(what)?;
            }
        }
        Ok(())
    }

    #[test]
    fn every_rival_does_every_operation_right() -> Result<()> {
        check_all::<f32>(&Impl::ALL, &Op::ALL)?;
        check_all::<bf16>(&Impl::ALL, &Op::ALL)?;
        check_all::<f64>(&Impl::ALL, &Op::ALL[..4])
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn so_they_do_what_is_timed_on_a_gpu() -> Result<()> {
        check_all::<f32>(&Impl::ALL, &Op::ON_GPU)?;
        check_all::<bf16>(&[Impl::StepAlone], &[Op::NoneSgd])
    }

    #[test]
    fn a_wrong_answer_is_found() -> Result<()> {
        let mut case = Case::<f32, _>::of_set(Set::D)?;
        case.question.norms[0] *= 1.0 + 1e-9;
        assert!(check(&mut Impl::CandleGradClip, &mut case, Op::TotalNorm).is_err());
        let mut case = Case::<f32, _>::of_set(Set::D)?;
        case.machine.fresh[7][0] = -1000.0; // it was above the limit for values
        for op in Op::ALL {
            for mut rival in [Impl::CandleGradClip, Impl::PasteIn] {
                assert!(
                    check(&mut rival, &mut case, op).is_err(),
                    "{op:?} {rival:?}"
                );
            }
        }
        assert!(check(&mut Impl::Floor, &mut case, Op::TotalNorm).is_err());
        Ok(())
    }
}
