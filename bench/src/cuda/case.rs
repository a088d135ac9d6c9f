//! A set's gradients on a GPU, and what room its rivals need.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};

use crate::calls::Call;
use crate::case::Machine;
use crate::cuda::gpu::{Gpu, Start};
use crate::element::Element;
use crate::op::{Impl, Op};

/// The gradients of a set.
pub(crate) struct OnGpu<'g> {
    pub(crate) gpu: &'g mut Gpu,
    pub(crate) start: Start,
    is_cold: bool,
    /// What gradients are before each call.
    fresh: Vec<Tensor>,
    grads: GradStore,
}

impl<'g> OnGpu<'g> {
    pub(crate) fn new(gpu: &'g mut Gpu, is_cold: bool) -> Self {
        Self {
            gpu,
            start: Start::Idle,
            is_cold,
            fresh: Vec::new(),
            grads: GradStore::default(),
        }
    }

    /// The memory that nobody has, with no gradients but the fresh ones.
    pub(crate) fn free_bytes(&mut self) -> Result<usize> {
        self.grads = GradStore::default();
        self.gpu.free_bytes()
    }

    /// The bytes that `rival` takes beside what is there already, roughly: moments, which are f32
    /// in ours, clipped gradients, and temporaries of the largest tensor.
    pub(crate) fn bytes_of<E: Element>(&self, rival: Impl, op: Op) -> usize {
        let elements: usize = self.fresh.iter().map(Tensor::elem_count).sum();
        let largest = self.fresh.iter().map(Tensor::elem_count).max();
        let largest = size_of::<f32>() * largest.unwrap_or(0);
        let params = size_of::<E>() * elements;
        match (rival, op) {
            (Impl::CandleGradClip, Op::ClipAdamW) => 2 * size_of::<f32>() * elements,
            (Impl::PasteIn, Op::TotalNorm) => 2 * largest,
            (Impl::PasteIn, Op::ClipAdamW) => 3 * params + 12 * largest,
            (Impl::PasteIn, _) => params + 3 * largest,
            _ => 0,
        }
    }
}

/// The least that has to be read and written: gradients once for the norm, then again with all that
/// changes. Moments are two f32 a parameter.
pub(crate) fn bytes_moved<E: Element>(op: Op, elements: usize) -> usize {
    let bytes = match op {
        Op::TotalNorm => size_of::<E>(),
        Op::ClipGradNorm => 3 * size_of::<E>(),
        Op::ClipAdamW => 4 * size_of::<E>() + 4 * size_of::<f32>(),
        _ => 4 * size_of::<E>(),
    };
    elements * bytes
}

impl<E: Element> Machine<E> for OnGpu<'_> {
    const NORM_TOLERANCE: f64 = 1e-9;
    const STEP_TOLERANCE: f64 = 2e-3;

    fn device(&self) -> Device {
        self.gpu.device.clone()
    }

    fn add(&mut self, var: &Var, values: Vec<E>) -> Result<()> {
        let grad = Tensor::from_vec(values, var.dims(), var.device())?;
        self.fresh.push(grad);
        Ok(())
    }

    fn fresh(&self, index: usize, _: &[usize]) -> Result<Tensor> {
        Ok(self.fresh[index].clone())
    }

    fn grads(&self, _: Impl) -> &GradStore {
        &self.grads
    }

    /// Parameters are set by then, and optimizers are made in their first step.
    fn prepare(&mut self, _: Op, _: &[Var]) {
        self.grads = GradStore::default();
    }

    /// Gradients are new tensors for what a call writes over. Steps write to no gradient: pasted
    /// code puts others into the store.
    fn time(
        &mut self,
        _: Impl,
        op: Op,
        vars: &[Var],
        call: &mut Call,
    ) -> Result<(f64, Option<f64>)> {
        for (var, fresh) in vars.iter().zip(&self.fresh) {
            let grad = if op == Op::ClipGradNorm {
                fresh.copy()?
            } else {
                fresh.clone()
            };
            self.grads.insert(var, grad);
        }
        let grads = &mut self.grads;
        let (ms, norm) = self.gpu.time(self.start, self.is_cold, |_| call(grads))?;
        let norm = norm.value()?;
        if op.is_step() {
            self.grads = GradStore::default(); // what is clipped takes room
        }
        Ok((ms, norm))
    }

    fn time_floor(&mut self, op: Op, vars: &[Var], _: f64) -> Result<f64> {
        let elements = vars.iter().map(|var| var.elem_count()).sum();
        let bytes = bytes_moved::<E>(op, elements);
        let (ms, ()) = self
            .gpu
            .time(self.start, self.is_cold, |gpu| gpu.move_bytes(bytes))?;
        Ok(ms)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn a_clipped_step_of_adamw_moves_eight_words() {
        let words = |op: Op| bytes_moved::<f32>(op, 1000) / 4000;
        assert_eq!(Op::ON_GPU.map(words), [1, 3, 8, 4, 4]);
        let bytes = |op: Op| bytes_moved::<bf16>(op, 1000) / 1000;
        assert_eq!(Op::ON_GPU.map(bytes), [2, 6, 24, 8, 8]);
    }
}
