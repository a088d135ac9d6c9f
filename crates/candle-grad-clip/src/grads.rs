//! collect: the gradients of the Vars, looked up and checked.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use crate::vars::VarList;
use crate::{Error, Result};

/// The gradient of each Var of `vars[start..start + found.len()]`, `None` where it got none.
///
/// Only Vars are asked for: a store also holds gradients of constants.
pub(crate) fn collect<'g>(
    vars: VarList<'_>,
    start: usize,
    grads: &'g GradStore,
    found: &mut [Option<&'g Tensor>],
) -> Result<()> {
    let block = &vars.vars[start..start + found.len()];
    // Three loops, not one: the cache misses of each are independent of each other, so the CPU
    // overlaps them. With thousands of small tensors these misses are most of the work.
    for (slot, var) in found.iter_mut().zip(block) {
        *slot = grads.get(var);
    }
    for (i, (slot, var)) in found.iter().zip(block).enumerate() {
        if let Some(grad) = slot
            && !agrees(var, grad)
        {
            return Err(disagreement(var, grad, vars.name(start + i)));
        }
    }
    Ok(())
}

fn agrees(var: &Var, grad: &Tensor) -> bool {
    grad.dtype() == var.dtype()
        && is_supported(grad.dtype())
        && device_has(grad.dtype(), || grad.device().is_metal())
        && grad.shape() == var.shape()
        && grad.device().same_device(var.device())
}

fn is_supported(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16)
}

/// Whether a device computes in a dtype: Metal has no f64.
pub(crate) fn device_has(dtype: DType, is_metal: impl FnOnce() -> bool) -> bool {
    dtype != DType::F64 || !is_metal()
}

/// The error that [`agrees`] found.
#[cold]
fn disagreement(var: &Var, grad: &Tensor, name: String) -> Error {
    if !is_supported(grad.dtype()) {
        return Error::UnsupportedDType {
            var: name,
            dtype: grad.dtype(),
        };
    }
    if !device_has(grad.dtype(), || grad.device().is_metal()) {
        return Error::MetalF64 { var: name };
    }
    let (property, expected, got) = if grad.shape() != var.shape() {
        (
            "shape",
            format!("{:?}", var.dims()),
            format!("{:?}", grad.dims()),
        )
    } else if grad.dtype() != var.dtype() {
        (
            "dtype",
            format!("{:?}", var.dtype()),
            format!("{:?}", grad.dtype()),
        )
    } else {
        // Two `Device::new_cuda(0)` have one location, and candle can't mix them either.
        let location = |tensor: &Tensor| format!("{:?}", tensor.device().location());
        let (expected, mut got) = (location(var), location(grad));
        if expected == got {
            got.push_str(" of another handle (make each device once, and clone it)");
        }
        ("device", expected, got)
    };
    Error::Mismatch {
        var: name,
        property,
        expected,
        got,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::device_has;

    #[test]
    fn only_f64_on_metal_is_missing() {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            assert!(device_has(dtype, || false), "{dtype:?}");
            assert_eq!(device_has(dtype, || true), dtype != DType::F64, "{dtype:?}");
        }
    }
}
