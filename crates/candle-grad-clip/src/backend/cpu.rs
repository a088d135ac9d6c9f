//! Our kernels on the storage of CPU tensors: the only `match` on a CPU tensor's dtype.

use std::cell::Cell;

use candle_core::{
    CpuStorage, InplaceOp1, InplaceOp2, Layout, Result as CandleResult, Storage, Tensor, Var,
};
use candle_grad_clip_kernels::{
    BLOCK, Edit, Element, GradEdit, MAX_MOMENTS, NormType, Stats, Units, Update, Wide, WideVec,
    accumulate as accumulate_slice, edit, edit_into as edit_slice_into, measure as measure_slice,
    measure_clamped, measure_units as measure_units_slice, round_into, update,
};

use crate::error::Result;
use crate::gradients::{Entry, GradStats, Place, Request};
use crate::param_state::{Kept, State, StepRule, arrays_mut};
use crate::threads;

/// Calls a generic function on the elements of a contiguous CPU tensor of one of the four dtypes,
/// and returns from the caller for any other.
macro_rules! with_slice {
    ($storage:expr, $layout:expr, $values:ident => $body:expr) => {{
        debug_assert!($layout.shape().elem_count() <= BLOCK || threads::may_be_parallel());
        match $storage {
            CpuStorage::F32($values) => $body,
            CpuStorage::F64($values) => $body,
            CpuStorage::F16($values) => $body,
            CpuStorage::BF16($values) => $body,
            other => return Err(refused(other, $layout).into()),
        }
    }};
}

/// Collecting has checked the dtype, and the callers see to contiguity: this is for candle's trait.
#[cold]
fn refused(storage: &CpuStorage, layout: &Layout) -> candle_core::Error {
    use candle_core::backend::BackendStorage;
    candle_core::Error::msg(format!(
        "candle-grad-clip expects contiguous F32, F64, F16 or BF16, got {:?} with {layout:?}",
        storage.dtype()
    ))
}

/// Measures an entry's gradient, and finds its storage.
pub(crate) fn measure(entry: &mut Entry<'_>, request: Request) -> Result<()> {
    let Some(grad) = entry.grad else {
        return Ok(());
    };
    let (storage, layout) = grad.storage_and_layout();
    entry.storage = std::ptr::from_ref::<Storage>(&storage).addr();
    if entry.place != Place::Cpu {
        drop(storage);
        let contiguous = grad.contiguous()?;
        let mut copy = Entry {
            grad: Some(&contiguous),
            place: Place::Cpu,
            ..*entry
        };
        measure(&mut copy, request)?;
        entry.measured = copy.measured;
        return Ok(());
    }
    let Storage::Cpu(storage) = &*storage else {
        return Err(candle_core::Error::msg("expected a tensor on CPU").into());
    };
    let (start, end) = (
        layout.start_offset(),
        layout.start_offset() + entry.elements,
    );
    with_slice!(storage, layout, values => {
        measure_values(&values[start..end], request, &mut entry.measured);
    });
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
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
    else {
        return Err(candle_core::Error::msg("expected a contiguous tensor on CPU").into());
    };
    with_slice!(storage, layout, values => {
        measure_units_slice(&values[start..end], units, norm_type, stats);
    });
    Ok(())
}

/// Writes where the result belongs: copying it about takes a tenth of a small gradient's time.
fn measure_values<E: Element>(values: &[E], request: Request, measured: &mut GradStats) {
    let norm_type = request.norm_type;
    let Some(clip_value) = request.clip_value else {
        *measured = GradStats {
            stats: measure_slice(values, norm_type),
            ..GradStats::ZERO
        };
        return;
    };
    let mut clamped = measure_clamped(values, norm_type, clip_value);
    let stats = clamped.before;
    if request.zero_non_finite && stats.non_finite() > 0 {
        // Rare: what becomes 0 counts nothing.
        let finite = values.iter().copied().filter(|x| x.to_f64().is_finite());
        clamped = measure_clamped(&finite.collect::<Vec<E>>(), norm_type, clip_value);
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

/// Writes the edited `grad` into `target`, which is contiguous and of its shape and dtype.
pub(crate) fn edit_into(grad: &Tensor, target: &Tensor, edit: GradEdit<'_>) -> Result<()> {
    Ok(target.inplace_op2(&grad.contiguous()?, &EditOp(edit))?)
}

struct EditOp<'a>(GradEdit<'a>);

impl InplaceOp1 for EditOp<'_> {
    fn name(&self) -> &'static str {
        "clip"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> CandleResult<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(refused(storage, layout));
        };
        with_slice!(storage, layout, values => edit(&mut values[start..end], self.0));
        Ok(())
    }
}

impl InplaceOp2 for EditOp<'_> {
    fn name(&self) -> &'static str {
        "clip-into"
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        target_layout: &Layout,
        source: &CpuStorage,
        source_layout: &Layout,
    ) -> CandleResult<()> {
        let (Some((start, end)), Some((source_start, source_end))) = (
            target_layout.contiguous_offsets(),
            source_layout.contiguous_offsets(),
        ) else {
            return Err(refused(source, source_layout));
        };
        with_slice!(target, target_layout, values => {
            let source = source.as_slice()?;
            edit_slice_into(&source[source_start..source_end], &mut values[start..end], self.0);
        });
        Ok(())
    }
}

/// Adds the edited `grad` to `sum`, or with `is_first` writes it there. Both are contiguous, and share no storage; `sum` is
/// F64 for F64, else F32.
pub(crate) fn accumulate(sum: &Tensor, grad: &Tensor, edit: Edit, is_first: bool) -> Result<()> {
    Ok(sum.inplace_op2(grad, &AddOp { edit, is_first })?)
}

/// Writes `sum * coef` into `target`, which is contiguous and of a half-precision dtype.
pub(crate) fn round(target: &Tensor, sum: &Tensor, coef: f64) -> Result<()> {
    Ok(target.inplace_op2(sum, &RoundOp { coef })?)
}

struct AddOp {
    edit: Edit,
    is_first: bool,
}

impl InplaceOp2 for AddOp {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn cpu_fwd(
        &self,
        sum: &mut CpuStorage,
        sum_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> CandleResult<()> {
        let (Some((start, end)), Some((grad_start, grad_end))) = (
            sum_layout.contiguous_offsets(),
            grad_layout.contiguous_offsets(),
        ) else {
            return Err(refused(grad, grad_layout));
        };
        macro_rules! add {
            ($grads:expr, $sums:expr) => {
                accumulate_slice(
                    &$grads[grad_start..grad_end],
                    &mut $sums[start..end],
                    self.edit,
                    self.is_first,
                )
            };
        }
        match (grad, sum) {
            (CpuStorage::F32(grads), CpuStorage::F32(sums)) => add!(grads, sums),
            (CpuStorage::F16(grads), CpuStorage::F32(sums)) => add!(grads, sums),
            (CpuStorage::BF16(grads), CpuStorage::F32(sums)) => add!(grads, sums),
            (CpuStorage::F64(grads), CpuStorage::F64(sums)) => add!(grads, sums),
            (grad, _) => return Err(refused(grad, grad_layout)),
        }
        Ok(())
    }
}

struct RoundOp {
    coef: f64,
}

impl InplaceOp2 for RoundOp {
    fn name(&self) -> &'static str {
        "round"
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        target_layout: &Layout,
        sum: &CpuStorage,
        sum_layout: &Layout,
    ) -> CandleResult<()> {
        let (CpuStorage::F32(sums), Some((start, end)), Some((sum_start, sum_end))) = (
            sum,
            target_layout.contiguous_offsets(),
            sum_layout.contiguous_offsets(),
        ) else {
            return Err(refused(sum, sum_layout));
        };
        let sums = &sums[sum_start..sum_end];
        match target {
            CpuStorage::F16(values) => round_into(sums, &mut values[start..end], self.coef),
            CpuStorage::BF16(values) => round_into(sums, &mut values[start..end], self.coef),
            other => return Err(refused(other, target_layout)),
        }
        Ok(())
    }
}

/// Takes an optimizer's step: writes the Var and its state. `grad` is contiguous and shares no storage with the Var.
pub(crate) fn step(
    var: &Var,
    grad: &Tensor,
    state: &mut State,
    kept: Kept,
    edit: GradEdit<'_>,
    rule: StepRule,
) -> Result<()> {
    let State::Host(state) = state else {
        return Err(candle_core::Error::msg("expected an optimizer state on CPU").into());
    };
    let state = Cell::new(Some(state));
    Ok(var.inplace_op2(
        grad,
        &StepOp {
            state,
            kept,
            edit,
            rule,
        },
    )?)
}

struct StepOp<'a> {
    /// candle's trait lends the operation itself for reading only.
    state: Cell<Option<&'a mut WideVec>>,
    kept: Kept,
    edit: GradEdit<'a>,
    rule: StepRule,
}

impl InplaceOp2 for StepOp<'_> {
    fn name(&self) -> &'static str {
        "clip-and-step"
    }

    fn cpu_fwd(
        &self,
        target: &mut CpuStorage,
        target_layout: &Layout,
        source: &CpuStorage,
        source_layout: &Layout,
    ) -> CandleResult<()> {
        let (Some((start, end)), Some((source_start, source_end)), Some(state)) = (
            target_layout.contiguous_offsets(),
            source_layout.contiguous_offsets(),
            self.state.take(),
        ) else {
            return Err(refused(source, source_layout));
        };
        with_slice!(target, target_layout, values => {
            let grads = &source.as_slice()?[source_start..source_end];
            step_values(&mut values[start..end], grads, state, self)
        })
    }
}

fn step_values<E: Element>(
    params: &mut [E],
    grads: &[E],
    state: &mut WideVec,
    op: &StepOp<'_>,
) -> CandleResult<()> {
    let Some(values) = E::Wide::of(state) else {
        return Err(candle_core::Error::msg(
            "an optimizer state of another dtype",
        ));
    };
    let mut arrays = arrays_mut(values, params.len());
    let mut moments = <[&mut [E::Wide]; MAX_MOMENTS]>::default();
    for (moment, array) in moments[..op.kept.moments].iter_mut().zip(&mut arrays) {
        *moment = array;
    }
    let whole = Update {
        params,
        grads,
        moments,
        master: arrays.next().unwrap_or_default(),
    };
    match op.rule {
        StepRule::AdamW(rule) => update(whole, op.edit, &rule),
        StepRule::Sgd(rule) => update(whole, op.edit, &rule),
    }
    Ok(())
}
