//! Collects and measures gradients: one pass over the Vars, one read of every gradient.

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use candle_grad_clip_kernels::BLOCK;
use rustc_hash::{FxBuildHasher, FxHashSet};

use crate::backend::{self, Backends};
use crate::error::{Error, Result};
use crate::gradients::{Entry, Measurements, Request, Residency};
use crate::pipeline::collect::collect;
use crate::tensors::{any_equal, storage_address};
use crate::threads::{for_each, for_each_large};
use crate::vars::VarList;

/// Vars per task.
const VARS_PER_TASK: usize = 64;

/// As [`measure`], for the gradients divided by `scale`, a power of two. `clip_value` also applies
/// to the divided gradients.
pub(crate) fn measure_unscaled<'g>(
    vars: VarList<'_>,
    grads: &'g GradStore,
    mut request: Request,
    scale: f64,
) -> Result<Measurements<'g>> {
    if scale == 1.0 {
        return measure(vars, grads, request);
    }
    request.clip_value = request.clip_value.map(|clip_value| clip_value * scale);
    let mut measured = measure(vars, grads, request)?;
    measured.total = measured.total.unscaled(scale);
    for entry in &mut measured.entries {
        entry.measured = entry.measured.unscaled(scale);
    }
    Ok(measured)
}

/// Collects and measures the gradients of `vars`.
pub(crate) fn measure<'g>(
    vars: VarList<'_>,
    grads: &'g GradStore,
    request: Request,
) -> Result<Measurements<'g>> {
    let mut entries = walk(vars, grads, Some(request))?;
    let mut total = backend::cuda::measure(&mut entries, request)?;
    backend::candle_ops::measure(&mut entries, request)?;
    let others = |entry: &&Entry<'_>| entry.grad.is_some() && !entry.residency.is_cuda();
    for entry in entries.iter().filter(others) {
        total = total.merge(entry.measured, request.norm_type);
    }
    Ok(Measurements {
        entries,
        total,
        norm_type: request.norm_type,
        units: None,
        loss: None,
    })
}

/// Collects the gradients of `vars`, and with a `request` measures those on CPU.
pub(crate) fn walk<'g>(
    vars: VarList<'_>,
    grads: &'g GradStore,
    request: Option<Request>,
) -> Result<Vec<Entry<'g>>> {
    let mut entries = vec![Entry::EMPTY; vars.vars.len()];
    let backends = Backends::current();
    let block = |(task, block): (usize, &mut [Entry<'g>])| {
        walk_block(vars, task * VARS_PER_TASK, grads, block, request, backends)
    };
    let blocks = entries.chunks_mut(VARS_PER_TASK).enumerate();
    for_each(vars.work, blocks, block)?;
    if vars.may_repeat() {
        forget_repeated(&mut entries);
    }
    let Some(request) = request else {
        return Ok(entries);
    };
    let is_large = |entry: &&mut Entry<'_>| entry.elements > BLOCK && entry.residency.is_cpu();
    let large = entries.iter_mut().filter(is_large);
    for_each_large(vars.work, large, |entry| {
        backend::cpu::measure(entry, request)
    })?;
    Ok(entries)
}

/// Collects a block of gradients, and measures the small ones on CPU.
fn walk_block<'g>(
    vars: VarList<'_>,
    start: usize,
    grads: &'g GradStore,
    block: &mut [Entry<'g>],
    request: Option<Request>,
    backends: Backends,
) -> Result<()> {
    let mut found = [None; VARS_PER_TASK];
    let found = &mut found[..block.len()];
    collect(vars, start, grads, found)?;
    for (entry, grad) in block.iter_mut().zip(&*found) {
        if let Some(grad) = *grad {
            entry.grad = Some(grad);
            entry.residency = backends.residency(grad);
            entry.elements = grad.elem_count();
        }
    }
    for entry in block
        .iter_mut()
        .filter(|entry| entry.residency != Residency::Elsewhere)
    {
        let Some(grad) = entry.grad else { continue };
        match request {
            Some(request) if entry.residency.is_cpu() && entry.elements <= BLOCK => {
                backend::cpu::measure(entry, request)?;
            }
            Some(_) if entry.residency.is_cpu() => {} // measured later, in parallel
            _ => entry.storage = storage_address(grad),
        }
    }
    Ok(())
}

/// Keeps one entry for a Var that is listed twice: both found the same gradient.
fn forget_repeated(entries: &mut [Entry<'_>]) {
    let grads = entries.iter().filter_map(|entry| entry.grad);
    let addresses = grads.map(|grad| std::ptr::from_ref(grad).addr());
    if !any_equal(entries.len(), addresses) {
        return;
    }
    let mut seen = FxHashSet::with_capacity_and_hasher(entries.len(), FxBuildHasher);
    for entry in entries {
        if let Some(grad) = entry.grad
            && !seen.insert(std::ptr::from_ref(grad).addr())
        {
            *entry = Entry::EMPTY;
        }
    }
}

/// The error under [`NonFinite::Error`](crate::NonFinite::Error).
pub(crate) fn non_finite_error(vars: VarList<'_>, measured: &Measurements<'_>) -> Error {
    let index = measured.first_non_finite().unwrap_or(0);
    let entry = &measured.entries[index];
    Error::NonFinite {
        var: vars.name(index),
        nan: entry.measured.stats.nan,
        infinite: entry.measured.stats.infinite,
        elements: entry.grad.map_or(0, Tensor::elem_count),
        total: measured.total.stats.non_finite(),
        norm_type: measured.norm_type,
    }
}
