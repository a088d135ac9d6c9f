//! Looks up the gradients of the Vars, and checks them.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::error::{Error, Result};
use crate::gradients::{Entry, Residency};
use crate::tensors::device_has;
use crate::vars::VarList;

/// Finds the gradient of each Var of `vars[start..start + found.len()]`; `None` if it has none.
pub(crate) fn collect<'g>(
    vars: VarList<'_>,
    start: usize,
    grads: &'g GradStore,
    found: &mut [Option<&'g Tensor>],
) -> Result<()> {
    let block = &vars.vars[start..start + found.len()];
    // Two loops, so that the CPU overlaps the cache misses of each: with thousands of small tensors
    // they are most of the work.
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

/// The error for a gradient that fails [`agrees`].
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
        // Two calls of `Device::new_cuda(0)` return devices with one location, but candle can't mix
        // them.
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

/// Refuses a store that has gradients, but none for `vars`: those of another model would pass
/// unclipped.
pub(crate) fn check_any_match(vars: &[Var], grads: &GradStore) -> Result<()> {
    // Fast: usually the first Var has a gradient.
    if vars.is_empty() || vars.iter().any(|var| grads.get(var).is_some()) {
        return Ok(());
    }
    match grads.get_ids().count() {
        0 => Ok(()),
        count => Err(Error::NoGradients {
            grads: count,
            vars: vars.len(),
        }),
    }
}

/// The gradient, if this crate's kernels read it.
pub(crate) fn readable<'g>(entry: &Entry<'g>) -> Option<&'g Tensor> {
    entry
        .grad
        .filter(|_| entry.residency != Residency::Elsewhere && entry.elements > 0)
}

/// Copies, by index, the gradients that the kernels can't read while they write to the storages in
/// `written`: those that are not contiguous, and those that share one of the storages.
pub(crate) fn copies_of_unreadable(
    entries: &[Entry<'_>],
    written: &FxHashSet<usize>,
) -> Result<FxHashMap<usize, Tensor>> {
    let mut copies = FxHashMap::default();
    for (index, entry) in entries.iter().enumerate() {
        let Some(grad) = readable(entry) else {
            continue;
        };
        if !entry.residency.is_in_place() || written.contains(&entry.storage) {
            copies.insert(index, grad.force_contiguous()?);
        }
    }
    Ok(copies)
}
