//! The tensors' own memory, for loops of our own over all of them at once.
//!
//! candle lends a tensor's memory for writing to an in-place op only, one tensor at a time. The
//! floor must not pay for 10,000 such calls, so the addresses are taken before the clock starts.
#![allow(unsafe_code)]

use std::cell::Cell;

use anyhow::{Context, Result, ensure};
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};

use crate::element::Element;

/// Calls `f` with the elements of contiguous CPU tensors that share no memory.
pub(crate) fn with_elements<E: Element, R>(
    tensors: &[&Tensor],
    f: impl FnOnce(Vec<&mut [E]>) -> R,
) -> Result<R> {
    let mut spans = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        spans.push(span::<E>(tensor)?);
    }
    let mut sorted = spans.clone();
    sorted.sort_unstable();
    let end = |(start, len): (*mut E, usize)| start.addr() + len * size_of::<E>();
    ensure!(
        sorted.windows(2).all(|w| end(w[0]) <= w[1].0.addr()),
        "tensors share memory"
    );
    let elements = spans
        .into_iter()
        .map(|(start, len)| {
            // SAFETY: `span` got both from candle just now, as a `&mut [E]` of that tensor's
            // contiguous memory, which the borrowed tensor keeps alive and where it is. No two
            // overlap (checked above), and nothing else uses them meanwhile: this program works on
            // its tensors from one thread, and `f` gets no tensor.
            unsafe { std::slice::from_raw_parts_mut(start, len) }
        })
        .collect();
    Ok(f(elements))
}

/// Where a tensor's elements start, and how many they are.
fn span<E: Element>(tensor: &Tensor) -> Result<(*mut E, usize)> {
    let op = Span::<E>(Cell::new(None));
    tensor.inplace_op1(&op)?;
    op.0.take()
        .with_context(|| format!("not a contiguous tensor of {:?}", E::DTYPE))
}

struct Span<E>(Cell<Option<(*mut E, usize)>>);

impl<E: Element> InplaceOp1 for Span<E> {
    fn name(&self) -> &'static str {
        "span"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let elements = layout
            .contiguous_offsets()
            .and_then(|(start, end)| E::values(storage)?.get_mut(start..end));
        self.0
            .set(elements.map(|elements| (elements.as_mut_ptr(), elements.len())));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn what_is_written_is_in_the_tensor() -> Result<()> {
        let t = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
        with_elements::<f32, _>(&[&t], |mut elements| elements[0][1] = 7.0)?;
        assert_eq!(t.to_vec1::<f32>()?, [0.0, 7.0, 0.0]);
        Ok(())
    }

    #[test]
    fn shared_memory_and_another_dtype_are_refused() -> Result<()> {
        let t = Tensor::zeros(4, DType::F32, &Device::Cpu)?;
        let part = t.narrow(0, 1, 2)?;
        assert!(with_elements::<f32, _>(&[&t, &part], |_| ()).is_err());
        assert!(with_elements::<f64, _>(&[&t], |_| ()).is_err());
        Ok(())
    }
}
