//! The CPU kernels on the storage of candle tensors.
#![allow(clippy::inline_always)] // a copy of what these functions return costs 15 ns a Var

use std::cell::Cell;
use std::ops::Range;

use candle_core::{
    CpuStorage, InplaceOp1, InplaceOp2, Layout, Result as CandleResult, Storage, Tensor, Var,
};
use candle_grad_clip_kernels::{
    self as kernels, BLOCK, Edit, Element, GradEdit, MAX_MOMENTS, NormType, Stats, Units, Update,
    Wide, WideVec,
};

use crate::error::Result;
use crate::gradients::{Entry, GradStats, Request, Residency};
use crate::param_state::{State, StateLayout, StepRule, arrays_mut};
use crate::threads;

/// Calls a generic function on the elements of a CPU storage. Returns an error from the caller if
/// the dtype is not one of the four.
macro_rules! with_slice {
    ($storage:expr, $values:ident => $body:expr) => {
        match $storage {
            CpuStorage::F32($values) => $body,
            CpuStorage::F64($values) => $body,
            CpuStorage::F16($values) => $body,
            CpuStorage::BF16($values) => $body,
            other => return Err(wrong_dtype(other).into()),
        }
    };
}

/// Required by candle's trait; `collect` has checked the dtype already.
#[cold]
fn wrong_dtype(storage: &CpuStorage) -> candle_core::Error {
    use candle_core::backend::BackendStorage;
    candle_core::Error::msg(format!(
        "candle-grad-clip expects F32, F64, F16 or BF16, got {:?}",
        storage.dtype()
    ))
}

/// The range of a tensor's elements in its storage. The tensor must be contiguous.
#[inline(always)]
fn range_of(layout: &Layout) -> CandleResult<Range<usize>> {
    debug_assert!(layout.shape().elem_count() <= BLOCK || threads::may_be_parallel());
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => Err(candle_core::Error::msg(format!(
            "candle-grad-clip expects a contiguous tensor, got {layout:?}"
        ))),
    }
}

/// Calls `body` with the storages and element ranges of two contiguous tensors that share no
/// storage. `body` writes to the first.
#[inline(always)]
fn zip_storages<F>(name: &'static str, target: &Tensor, source: &Tensor, body: F) -> Result<()>
where
    F: FnOnce((&mut CpuStorage, Range<usize>), (&CpuStorage, Range<usize>)) -> CandleResult<()>,
{
    let body = Cell::new(Some(body));
    Ok(target.inplace_op2(source, &ZipStorages { name, body })?)
}

struct ZipStorages<F> {
    name: &'static str,
    /// candle's trait passes the operation by shared reference.
    body: Cell<Option<F>>,
}

impl<F> InplaceOp2 for ZipStorages<F>
where
    F: FnOnce((&mut CpuStorage, Range<usize>), (&CpuStorage, Range<usize>)) -> CandleResult<()>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    #[inline]
    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        target_layout: &Layout,
        source: &CpuStorage,
        source_layout: &Layout,
    ) -> CandleResult<()> {
        let (to, from) = (range_of(target_layout)?, range_of(source_layout)?);
        match self.body.take() {
            Some(body) => body((target, to), (source, from)),
            None => Err(candle_core::Error::msg("candle runs an operation once")),
        }
    }
}

/// Measures an entry's gradient, and sets the entry's storage address.
pub(crate) fn measure(entry: &mut Entry<'_>, request: Request) -> Result<()> {
    let Some(grad) = entry.grad else {
        return Ok(());
    };
    let (storage, layout) = grad.storage_and_layout();
    entry.storage = std::ptr::from_ref::<Storage>(&storage).addr();
    if entry.residency != Residency::Cpu {
        drop(storage);
        let contiguous = grad.contiguous()?;
        let mut copy = Entry {
            grad: Some(&contiguous),
            residency: Residency::Cpu,
            ..*entry
        };
        measure(&mut copy, request)?;
        entry.measured = copy.measured;
        return Ok(());
    }
    let Storage::Cpu(storage) = &*storage else {
        return Err(candle_core::Error::msg("expected a tensor on CPU").into());
    };
    debug_assert!(entry.elements <= BLOCK || threads::may_be_parallel());
    let range = layout.start_offset()..layout.start_offset() + entry.elements;
    with_slice!(storage, values => measure_values(&values[range], request, &mut entry.measured));
    Ok(())
}

/// Measures each unit of a tensor into `stats`.
pub(crate) fn measure_units(
    tensor: &Tensor,
    units: Units,
    norm_type: NormType,
    stats: &mut [Stats],
) -> Result<()> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(candle_core::Error::msg("expected a tensor on CPU").into());
    };
    let range = range_of(layout)?;
    with_slice!(storage, values => kernels::measure_units(&values[range], units, norm_type, stats));
    Ok(())
}

/// Writes to `measured` directly: copying the result takes a tenth of a small gradient's time.
fn measure_values<E: Element>(values: &[E], request: Request, measured: &mut GradStats) {
    let norm_type = request.norm_type;
    let Some(clip_value) = request.clip_value else {
        *measured = GradStats {
            stats: kernels::measure(values, norm_type),
            ..GradStats::ZERO
        };
        return;
    };
    let mut clamped = kernels::measure_clamped(values, norm_type, clip_value);
    let stats = clamped.before;
    if request.zero_non_finite && stats.non_finite() > 0 {
        // Rare: elements that become 0 must not count.
        let finite = values.iter().copied().filter(|x| x.to_f64().is_finite());
        clamped = kernels::measure_clamped(&finite.collect::<Vec<E>>(), norm_type, clip_value);
    }
    *measured = GradStats {
        stats,
        clamped: clamped.after,
        num_clipped: clamped.num_clipped,
    };
}

/// Edits a contiguous gradient in place.
pub(crate) fn edit_in_place(grad: &Tensor, edit: GradEdit<'_>) -> Result<()> {
    Ok(grad.inplace_op1(&EditOp(edit))?)
}

struct EditOp<'a>(GradEdit<'a>);

impl InplaceOp1 for EditOp<'_> {
    fn name(&self) -> &'static str {
        "clip"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> CandleResult<()> {
        let range = range_of(layout)?;
        with_slice!(storage, values => kernels::edit(&mut values[range], self.0));
        Ok(())
    }
}

/// Writes the edited `grad` to `target`, which is contiguous and has the same shape and dtype.
pub(crate) fn edit_into(grad: &Tensor, target: &Tensor, edit: GradEdit<'_>) -> Result<()> {
    let grad = grad.contiguous()?;
    zip_storages("clip-into", target, &grad, |(target, to), (grad, from)| {
        with_slice!(target, values => {
            kernels::edit_into(&grad.as_slice()?[from], &mut values[to], edit);
        });
        Ok(())
    })
}

/// Adds the edited `grad` to `sum`, or overwrites `sum` if `is_first`. Both are contiguous and
/// share no storage. `sum` is F64 for an F64 gradient, else F32.
pub(crate) fn accumulate(sum: &Tensor, grad: &Tensor, edit: Edit, is_first: bool) -> Result<()> {
    zip_storages("accumulate", sum, grad, |(sum, to), (grad, from)| {
        macro_rules! add {
            ($grads:expr, $sums:expr) => {
                kernels::accumulate(&$grads[from], &mut $sums[to], edit, is_first)
            };
        }
        match (grad, sum) {
            (CpuStorage::F32(grads), CpuStorage::F32(sums)) => add!(grads, sums),
            (CpuStorage::F16(grads), CpuStorage::F32(sums)) => add!(grads, sums),
            (CpuStorage::BF16(grads), CpuStorage::F32(sums)) => add!(grads, sums),
            (CpuStorage::F64(grads), CpuStorage::F64(sums)) => add!(grads, sums),
            (grad, _) => return Err(wrong_dtype(grad)),
        }
        Ok(())
    })
}

/// Writes `sum * coef` to `target`, which is contiguous and of a half-precision dtype.
pub(crate) fn round(target: &Tensor, sum: &Tensor, coef: f64) -> Result<()> {
    zip_storages("round", target, sum, |(target, to), (sum, from)| {
        let CpuStorage::F32(sums) = sum else {
            return Err(wrong_dtype(sum));
        };
        match target {
            CpuStorage::F16(values) => kernels::round_into(&sums[from], &mut values[to], coef),
            CpuStorage::BF16(values) => kernels::round_into(&sums[from], &mut values[to], coef),
            other => return Err(wrong_dtype(other)),
        }
        Ok(())
    })
}

/// Takes an optimizer step: writes the Var and its state. `grad` is contiguous and shares no
/// storage with the Var.
pub(crate) fn step(
    var: &Var,
    grad: &Tensor,
    state: &mut State,
    layout: StateLayout,
    edit: GradEdit<'_>,
    rule: StepRule,
) -> Result<()> {
    let State::Host(state) = state else {
        return Err(candle_core::Error::msg("expected an optimizer state on CPU").into());
    };
    zip_storages("clip-and-step", var, grad, |(params, to), (grad, from)| {
        with_slice!(params, params => {
            let update = with_state(&mut params[to], &grad.as_slice()?[from], state, layout)?;
            match rule {
                StepRule::AdamW(rule) => kernels::update(update, edit, &rule),
                StepRule::Sgd(rule) => kernels::update(update, edit, &rule),
            }
        });
        Ok(())
    })
}

/// A parameter with its state arrays.
#[inline(always)]
fn with_state<'a, E: Element>(
    params: &'a mut [E],
    grads: &'a [E],
    state: &'a mut WideVec,
    layout: StateLayout,
) -> CandleResult<Update<'a, E>> {
    let Some(values) = E::Wide::of(state) else {
        return Err(candle_core::Error::msg(
            "an optimizer state of another dtype",
        ));
    };
    let mut arrays = arrays_mut(values, params.len());
    let mut moments = <[&mut [E::Wide]; MAX_MOMENTS]>::default();
    for (moment, array) in moments[..layout.moments].iter_mut().zip(&mut arrays) {
        *moment = array;
    }
    Ok(Update {
        params,
        grads,
        moments,
        master: arrays.next().unwrap_or_default(),
    })
}
