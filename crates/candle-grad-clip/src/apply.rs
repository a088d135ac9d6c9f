//! apply: what was decided, done to the gradients.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, TensorId};
use candle_grad_clip_kernels::{BLOCK, Edit};
use rayon::prelude::*;
use rustc_hash::{FxBuildHasher, FxHashSet};

use crate::Result;
use crate::backend::{self, Backends};
use crate::measure::Entry;
use crate::vars::VarList;

/// Gradients that one task edits.
const GRADS_PER_TASK: usize = 64;

/// Edits the gradients of `vars` in place, and returns those that must replace their entry of
/// `grads`, as `entries` still borrows from it.
///
/// A gradient that shares storage with another entry or with a Var, or that is not contiguous, gets
/// storage of its own, so that nothing is scaled twice and no weight is touched. Whatever can fail
/// comes before the first write.
#[must_use = "the replacements must be inserted into `grads`"]
pub(crate) fn edit_in_place(
    vars: VarList<'_>,
    grads: &GradStore,
    entries: &[Entry<'_>],
    edit: Edit,
) -> Result<Vec<(TensorId, Tensor)>> {
    let backends = Backends::current();
    let mut shared = SharedStorage::find(vars, grads, entries);
    let mut in_place = Vec::with_capacity(entries.len());
    let mut replacements = Vec::new();
    for (entry, var) in entries.iter().zip(vars.vars) {
        let Some(grad) = entry.grad else { continue };
        if !needs_edit(grad, entry, edit) {
            continue;
        }
        if backends.is_on_cpu(grad) && !shared.is_taken(entry.storage) && grad.is_contiguous() {
            in_place.push(grad);
        } else {
            replacements.push((var.id(), backend::edited(grad, edit, backends)?));
        }
    }
    // From the last to the first: measuring has left the last ones in the cache.
    in_place.reverse();
    backend::run(vars.work(), |parallel| {
        for_each(
            &in_place,
            parallel,
            |grad| grad.elem_count(),
            |grad| backend::edit_cpu(grad, edit),
        )
    })?;
    Ok(replacements)
}

/// A new store in which the gradients of `vars` are edited copies, and all others those of `grads`.
///
/// `scratch` has a place for every Var; what is in it is written to, and what is missing is put
/// into it, so that the next call allocates nothing of a gradient's size.
pub(crate) fn edit_copies(
    vars: VarList<'_>,
    grads: &GradStore,
    entries: &[Entry<'_>],
    edit: Edit,
    scratch: &mut [Option<Tensor>],
) -> Result<GradStore> {
    let backends = Backends::current();
    let mut store = GradStore::default();
    for id in grads.get_ids() {
        if let Some(grad) = grads.get_id(*id) {
            store.insert_id(*id, grad.clone());
        }
    }
    let mut on_cpu = Vec::new();
    for ((entry, var), scratch) in entries.iter().zip(vars.vars).zip(scratch) {
        let Some(grad) = entry.grad else { continue };
        if !needs_edit(grad, entry, edit) {
            continue;
        }
        let copy = if backends.is_on_cpu(grad) {
            let target = match scratch {
                Some(target) => target,
                None => scratch.insert(grad.zeros_like()?),
            };
            on_cpu.push((grad, target.clone()));
            target.clone()
        } else {
            backend::edited(grad, edit, backends)?
        };
        store.insert_id(var.id(), copy);
    }
    on_cpu.reverse();
    backend::run(vars.work(), |parallel| {
        let elements = |(grad, _): &(&Tensor, Tensor)| grad.elem_count();
        for_each(&on_cpu, parallel, elements, |(grad, target)| {
            backend::edit_cpu_into(grad, target, edit)
        })
    })?;
    Ok(store)
}

/// Whether the edit changes this gradient: not one without elements (which candle's in-place
/// operations refuse, as its strides contain a 0), nor, at a coefficient of 1, a clean one.
fn needs_edit(grad: &Tensor, entry: &Entry<'_>, edit: Edit) -> bool {
    match edit {
        _ if grad.elem_count() == 0 => false,
        Edit::Scale {
            clip_coef: 1.0,
            zero_non_finite,
        } => zero_non_finite && entry.measured.stats.non_finite() > 0,
        Edit::Scale { .. } | Edit::Clamp { .. } => true,
    }
}

/// The storages that must not be written to: those of Vars and of gradients of anything else, and
/// those already taken by an earlier entry.
struct SharedStorage<'a> {
    of_vars: std::borrow::Cow<'a, FxHashSet<usize>>,
    taken: FxHashSet<usize>,
}

impl<'a> SharedStorage<'a> {
    fn find(vars: VarList<'a>, grads: &GradStore, entries: &[Entry<'_>]) -> Self {
        let mut taken = FxHashSet::with_capacity_and_hasher(entries.len(), FxBuildHasher);
        let found = entries.iter().filter_map(|entry| entry.grad);
        let (len, _) = grads.get_ids().size_hint();
        if len > found.clone().count() {
            let ours: FxHashSet<*const Tensor> = found.map(std::ptr::from_ref).collect();
            let all = grads.get_ids().filter_map(|id| grads.get_id(*id));
            let others = all.filter(|grad| !ours.contains(&std::ptr::from_ref(*grad)));
            taken.extend(others.map(backend::storage_address));
        }
        Self {
            of_vars: vars.storages(),
            taken,
        }
    }

    /// Whether the storage is taken; from now on it is.
    fn is_taken(&mut self, storage: usize) -> bool {
        self.of_vars.contains(&storage) || !self.taken.insert(storage)
    }
}

/// Calls `f` on every item: small ones in parallel, a task for many; each large one by itself,
/// as it is parallel inside.
fn for_each<T: Sync>(
    items: &[T],
    parallel: bool,
    elements: impl Fn(&T) -> usize + Sync,
    f: impl Fn(&T) -> Result<()> + Sync,
) -> Result<()> {
    if !parallel {
        return items.iter().try_for_each(f);
    }
    let is_small = |item: &&T| elements(item) <= BLOCK;
    items
        .par_chunks(GRADS_PER_TASK)
        .try_for_each(|task| task.iter().filter(is_small).try_for_each(&f))?;
    items.iter().filter(|item| !is_small(item)).try_for_each(&f)
}
