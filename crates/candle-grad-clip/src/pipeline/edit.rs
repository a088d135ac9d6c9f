//! Applies edits to the gradients.

use std::borrow::Cow;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, TensorId};
use candle_grad_clip_kernels::{BLOCK, Edit, GradEdit};
use rustc_hash::{FxBuildHasher, FxHashSet};

use crate::backend;
use crate::candle_versions::empty_store;
use crate::clip::Edits;
use crate::error::Result;
use crate::gradients::{Entry, Residency};
use crate::tensors::{any_equal, storage_address, storage_addresses, touch_headers};
use crate::threads::{Work, for_each, for_each_large};
use crate::vars::VarList;

/// Gradients that one task edits.
const JOBS_PER_TASK: usize = 64;

/// Edits the gradients of `vars` in place. Returns the new tensors that must replace entries of
/// `grads`, since `entries` still borrows from it.
///
/// A gradient gets new storage if it is not contiguous, or if it shares storage with a Var or with
/// another tensor's entry. If gradients of `vars` share storage, only the first contiguous one
/// keeps it. This way no gradient is scaled twice and no weight changes. Checks, allocations and
/// uploads come before the first write. Each GPU has one launch, one after the other: if a later one
/// fails, the gradients on the GPUs before it are edited already.
#[must_use = "the replacements must be inserted into `grads`"]
pub(crate) fn edit_in_place(
    vars: VarList<'_>,
    grads: &GradStore,
    entries: &[Entry<'_>],
    edits: &Edits,
) -> Result<Vec<(TensorId, Tensor)>> {
    if edits.is_nothing() {
        return Ok(Vec::new()); // before the search for shared storage
    }
    // A free function has no set of its Vars' storages: first check whether it needs one.
    let mut shared = (!vars.may_repeat() || any_shared(vars, grads, entries))
        .then(|| SharedStorage::find(vars, grads, entries));
    let mut is_taken = |storage| shared.as_mut().is_some_and(|set| set.is_taken(storage));
    let mut jobs = Vec::with_capacity(entries.len());
    let mut replacements = Vec::new();
    for (index, (entry, var)) in entries.iter().zip(vars.vars).enumerate() {
        let Some(grad) = entry.grad else { continue };
        let edit = edits.of(index);
        if !needs_edit(entry, edit) {
            continue;
        }
        if entry.residency.is_in_place() && !is_taken(entry.storage) {
            jobs.push(Job {
                grad,
                target: None,
                edit,
                elements: entry.elements,
                residency: entry.residency,
            });
        } else {
            replacements.push((var.id(), backend::edit_to_new(grad, entry, edit)?));
        }
    }
    run(&jobs, vars.work)?;
    Ok(replacements)
}

/// A new store with edited copies of the gradients of `vars`, and the other gradients of `grads`.
///
/// The copies are written to `scratch`, so the next call allocates no memory of a gradient's size.
pub(crate) fn edit_copies(
    vars: VarList<'_>,
    grads: &GradStore,
    entries: &[Entry<'_>],
    edits: &Edits,
    scratch: &mut Scratch,
) -> Result<GradStore> {
    scratch.avoid(entries);
    let mut store = empty_store()?;
    for id in grads.get_ids() {
        if let Some(grad) = grads.get_id(*id) {
            store.insert_id(*id, grad.clone());
        }
    }
    let mut jobs = Vec::new();
    for (index, (entry, var)) in entries.iter().zip(vars.vars).enumerate() {
        let Some(grad) = entry.grad else { continue };
        let edit = edits.of(index);
        if !needs_edit(entry, edit) {
            continue;
        }
        let copy = if entry.residency == Residency::Elsewhere {
            backend::edit_to_new(grad, entry, edit)?
        } else {
            let target = scratch.tensor(index, grad)?;
            jobs.push(Job {
                grad,
                target: Some(target.clone()),
                edit,
                elements: entry.elements,
                residency: entry.residency,
            });
            target
        };
        store.insert_id(var.id(), copy);
    }
    run(&jobs, vars.work)?;
    Ok(store)
}

/// Tensors for the copies of gradients, kept from step to step: one per Var, allocated on first
/// use.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    tensors: Vec<Option<Tensor>>,
    storages: FxHashSet<usize>,
}

impl Scratch {
    /// Drops its tensors if the caller's gradients include one of them (an optimizer can hand out
    /// what it received): a tensor must not be read and written at once.
    fn avoid(&mut self, entries: &[Entry<'_>]) {
        if entries
            .iter()
            .any(|entry| self.storages.contains(&entry.storage))
        {
            *self = Self::default();
        }
    }

    fn tensor(&mut self, index: usize, grad: &Tensor) -> Result<Tensor> {
        if self.tensors.len() <= index {
            self.tensors.resize(index + 1, None);
        }
        let place = &mut self.tensors[index];
        if let Some(tensor) = place {
            return Ok(tensor.clone());
        }
        let tensor = grad.zeros_like()?;
        self.storages.insert(storage_address(&tensor));
        *place = Some(tensor.clone());
        Ok(tensor)
    }
}

/// Whether the edit changes this gradient. False for one without elements (candle's in-place
/// operations refuse it, since its strides contain a 0), and for a finite one at a coefficient of
/// 1.
fn needs_edit(entry: &Entry<'_>, edit: GradEdit<'_>) -> bool {
    match edit {
        _ if entry.elements == 0 => false,
        GradEdit::All(Edit::Scale {
            clip_coef: 1.0,
            zero_non_finite,
        }) => zero_non_finite && entry.measured.stats.non_finite() > 0,
        GradEdit::All(Edit::Scale { .. } | Edit::Clamp { .. }) | GradEdit::Units(_) => true,
    }
}

/// Whether any two of the Vars and the gradients in the store share storage.
fn any_shared(vars: VarList<'_>, grads: &GradStore, entries: &[Entry<'_>]) -> bool {
    let of_vars = storage_addresses(vars.vars, vars.work).into_iter();
    let ours = entries.iter().filter(|entry| entry.grad.is_some());
    let (in_store, _) = grads.get_ids().size_hint();
    let len = vars.vars.len() + in_store;
    if in_store == ours.clone().count() {
        any_equal(len, of_vars.chain(ours.map(|entry| entry.storage)))
    } else {
        let all = grads.get_ids().filter_map(|id| grads.get_id(*id));
        any_equal(len, of_vars.chain(all.map(storage_address)))
    }
}

/// The storages that must not be written: those of Vars and of other tensors' gradients, and those
/// of earlier entries.
struct SharedStorage<'a> {
    of_vars: Cow<'a, FxHashSet<usize>>,
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
            taken.extend(others.map(storage_address));
        }
        Self {
            of_vars: vars.storages(),
            taken,
        }
    }

    /// Whether the storage is taken. Marks it as taken.
    fn is_taken(&mut self, storage: usize) -> bool {
        self.of_vars.contains(&storage) || !self.taken.insert(storage)
    }
}

/// A gradient to edit, and the tensor to write to, unless it is edited in place.
struct Job<'g> {
    grad: &'g Tensor,
    target: Option<Tensor>,
    edit: GradEdit<'g>,
    elements: usize,
    residency: Residency,
}

/// Runs all jobs, those on GPUs first, since their launches can fail.
fn run(jobs: &[Job<'_>], work: Work) -> Result<()> {
    if jobs.iter().any(|job| job.residency.is_cuda()) {
        run_on_gpu(jobs)?;
    }
    let run = |job: &Job<'_>| match &job.target {
        _ if job.residency.is_cuda() => Ok(()),
        Some(target) => backend::cpu::edit_into(job.grad, target, job.edit),
        None => backend::cpu::edit_in_place(job.grad, job.edit),
    };
    let elements = |job: &Job<'_>| job.elements;
    run_all(jobs, work, elements, |job| job.grad, run)
}

fn run_on_gpu(jobs: &[Job<'_>]) -> Result<()> {
    let jobs: Vec<&Job<'_>> = jobs.iter().filter(|job| job.residency.is_cuda()).collect();
    let sources = jobs.iter().map(|job| job.grad.contiguous());
    let sources: Vec<Tensor> = sources.collect::<candle_core::Result<_>>()?;
    let mut edits = Vec::with_capacity(jobs.len());
    for (job, source) in jobs.iter().zip(&sources) {
        let target = job.target.as_ref().unwrap_or(job.grad);
        edits.push((source, target, backend::expect_uniform_edit(job.edit)?));
    }
    backend::cuda::edit(&edits)
}

/// Runs all jobs: many small ones per task, in parallel, and large ones one after the other, since
/// each is parallel inside. The order is last to first: the last gradients measured are still in
/// the cache.
pub(crate) fn run_all<J: Sync>(
    jobs: &[J],
    work: Work,
    elements: impl Fn(&J) -> usize + Sync,
    grad: impl Fn(&J) -> &Tensor + Sync,
    run: impl Fn(&J) -> Result<()> + Sync,
) -> Result<()> {
    for_each(work, jobs.chunks(JOBS_PER_TASK).rev(), |task| {
        let small = || task.iter().rev().filter(|job| elements(job) <= BLOCK);
        // Read all headers first, so that their cache misses overlap.
        touch_headers(small().map(&grad));
        small().try_for_each(&run)
    })?;
    let large = jobs.iter().rev().filter(|job| elements(job) > BLOCK);
    for_each_large(work, large, run)
}

/// Inserts the tensors that replace gradients.
pub(crate) fn insert(grads: &mut GradStore, replacements: Vec<(TensorId, Tensor)>) {
    for (id, grad) in replacements {
        grads.insert_id(id, grad);
    }
}
