//! The step of a fused optimizer: one pass over the Vars, their gradients and states.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, TensorId, Var};
use candle_grad_clip_kernels::{BLOCK, Edit, GradEdit, NormType};
use rustc_hash::FxHashMap;

use super::param_states::ParamStates;
use crate::backend::{self, Counted, StepResult, Stepped, UpdateJob};
use crate::clip::Edits;
use crate::error::Result;
use crate::gradients::{Entry, Plan, Request, Residency, route_cuda_to_candle_ops};
use crate::param_state::{State, StepRule};
use crate::pipeline::collect::{copies_of_unreadable, readable};
use crate::pipeline::measure::walk;
use crate::tensors::touch_headers;
use crate::threads::{for_each, for_each_large};
use crate::vars::NamedVars;

/// Vars that one task updates.
const VARS_PER_TASK: usize = 64;

/// The edit of a Var's gradient, by the Var's index.
type EditOf<'a> = dyn Fn(usize) -> GradEdit<'a> + Sync + 'a;

/// Collected gradients with their edits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GradEdits<'a> {
    pub(crate) vars: &'a NamedVars,
    /// One for each of `vars`.
    pub(crate) entries: &'a [Entry<'a>],
    pub(crate) edits: &'a Edits,
    /// The edit of Vars that are not among `vars`.
    pub(crate) others: Edit,
}

impl ParamStates {
    /// Takes a step with `rules`: the first is for Vars without a group, the others are for the
    /// groups. Everything that can fail comes before the first write.
    pub(crate) fn step(
        &mut self,
        grads: &GradStore,
        clipped: Option<GradEdits<'_>>,
        rules: &[StepRule],
    ) -> Result<()> {
        self.sync_counters()?;
        match clipped {
            Some(GradEdits {
                vars,
                entries,
                edits,
                ..
            }) if Arc::ptr_eq(self.vars.shared_names(), vars.shared_names()) => {
                self.step_entries(entries, &|index| edits.of(index), rules)?;
            }
            clipped => self.step_collecting(grads, clipped, rules)?,
        }
        self.steps += 1;
        Ok(())
    }

    /// Like [`ParamStates::step`], for gradients that are not collected yet or belong to other Vars
    /// than ours. Vars that are not clipped get the edit `others`.
    fn step_collecting(
        &mut self,
        grads: &GradStore,
        clipped: Option<GradEdits<'_>>,
        rules: &[StepRule],
    ) -> Result<()> {
        let mut entries = walk(self.vars.list(), grads, None)?;
        if clipped.is_some_and(|clipped| clipped.edits.are_of_units()) {
            entries = route_cuda_to_candle_ops(entries);
        }
        let Some(clipped) = clipped else {
            return self.step_entries(&entries, &|_| Edit::NOTHING.into(), rules);
        };
        // Edits by candle's operations need to know whether all elements are finite.
        backend::candle_ops::measure(&mut entries, Request::norm(NormType::L1))?;
        let ids = clipped.vars.vars().iter().map(|var| var.id());
        let theirs: FxHashMap<TensorId, usize> = ids.zip(0..).collect();
        let edit = |var: &Var| {
            let index = theirs.get(&var.id());
            index.map_or(clipped.others.into(), |index| clipped.edits.of(*index))
        };
        let edits: Vec<GradEdit<'_>> = self.vars.vars().iter().map(edit).collect();
        self.step_entries(&entries, &|index| edits[index], rules)
    }

    fn step_entries(
        &mut self,
        entries: &[Entry<'_>],
        edit: &EditOf<'_>,
        rules: &[StepRule],
    ) -> Result<()> {
        let owned = copies_of_unreadable(entries, &self.vars.list().storages())?;
        let stepped = self.step_elsewhere(entries, edit, rules)?;
        let started = self.start_states(entries)?;
        let (group_of, counts) = (self.group_of.clone(), self.counts.clone());
        let mut jobs = self.update_jobs(entries, &owned, &started, edit)?;
        if !jobs.is_empty() {
            let rules = rules_of(&mut jobs, rules, &counts);
            backend::cuda::update(&jobs, &rules)?;
        }
        // From here on nothing should fail.
        for (index, state) in started {
            self.states[index] = state;
        }
        self.step_on_cpu(entries, &owned, edit, |index| {
            rules[rule_index(group_of[index])].of(counts[index])
        })?;
        for (index, stepped) in stepped {
            self.vars.vars()[index].set(&stepped.param)?;
            self.states[index] = stepped.state;
        }
        drop(counts); // so that `make_mut` copies nothing
        let counts = Arc::make_mut(&mut self.counts).iter_mut();
        for (count, entry) in counts.zip(entries) {
            *count += u64::from(entry.grad.is_some() && entry.elements > 0);
        }
        Ok(())
    }

    /// Takes a step in which the GPU decides a plain norm or value clip. `None` if it cannot: the
    /// gradients are not all on one GPU, or the Vars are not ours. The result is read on demand.
    /// `skips_in_a_row` initializes the counter of a GPU that does not count yet.
    pub(crate) fn step_on_device(
        &mut self,
        clipped: GradEdits<'_>,
        plan: &Plan,
        rules: &[StepRule],
        skips_in_a_row: u32,
        keeps_norms: bool,
    ) -> Result<Option<Arc<dyn StepResult>>> {
        let GradEdits {
            vars,
            entries,
            edits,
            ..
        } = clipped;
        let Some(device) = only_cuda(entries) else {
            return Ok(None);
        };
        if !Arc::ptr_eq(self.vars.shared_names(), vars.shared_names()) {
            return Ok(None);
        }
        let owned = copies_of_unreadable(entries, &self.vars.list().storages())?;
        let there = self.device_steps.as_ref().map(|steps| steps.device());
        if !there.is_some_and(|there| there.same_device(&device)) {
            self.sync_counters()?;
            let counted = Counted {
                steps: self.steps,
                skips_in_a_row,
                counts: self.counts.to_vec(),
            };
            self.device_steps = Some(backend::cuda::start_steps(&device, &counted)?);
        }
        // The GPU counts the steps of each Var, so a Var that has taken none may already have
        // state.
        for (index, state) in self.start_states(entries)? {
            self.states[index] = state;
        }
        let Some(mut steps) = self.device_steps.take() else {
            return Ok(None);
        };
        let jobs = self.update_jobs(entries, &owned, &[], &|index| edits.of(index));
        let result = jobs.and_then(|jobs| steps.step(&jobs, rules, plan, keeps_norms));
        self.device_steps = Some(steps);
        result.map(Some)
    }

    /// The jobs of our CUDA kernels. `started` has the states of Vars that have none yet.
    fn update_jobs<'a>(
        &'a self,
        entries: &[Entry<'a>],
        owned: &'a FxHashMap<usize, Tensor>,
        started: &'a [(usize, State)],
        edit: &EditOf<'_>,
    ) -> Result<Vec<UpdateJob<'a>>> {
        let job = |(index, entry): (usize, &Entry<'a>)| {
            let grad = readable(entry).filter(|_| entry.residency.is_cuda())?;
            let fresh = started.binary_search_by_key(&index, |(index, _)| *index);
            let edit = backend::expect_uniform_edit(edit(index));
            Some(edit.map(|edit| UpdateJob {
                var: &self.vars.vars()[index],
                grad: owned.get(&index).unwrap_or(grad),
                state: fresh.map_or(&self.states[index], |place| &started[place].1),
                layout: self.layout,
                edit,
                rule: rule_index(self.group_of[index]),
                is_first: self.counts[index] == 0,
                index,
            }))
        };
        entries.iter().enumerate().filter_map(job).collect()
    }

    /// The first state of the Vars that our kernels update for the first time, in their order.
    fn start_states(&self, entries: &[Entry<'_>]) -> Result<Vec<(usize, State)>> {
        let mut started = Vec::new();
        for (index, (entry, state)) in entries.iter().zip(&self.states).enumerate() {
            if matches!(state, State::Fresh) && readable(entry).is_some() {
                let state = State::start(&self.vars.vars()[index], self.layout)?;
                started.push((index, state));
            }
        }
        Ok(started)
    }

    /// The next values and states of the Vars that candle's operations update. On the caller's
    /// thread, since candle's CUDA devices use a stream per thread.
    fn step_elsewhere(
        &self,
        entries: &[Entry<'_>],
        edit: &EditOf<'_>,
        rules: &[StepRule],
    ) -> Result<Vec<(usize, Stepped)>> {
        let mut stepped = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            let Some(grad) = entry.grad else { continue };
            if entry.residency == Residency::Elsewhere && entry.elements > 0 {
                let (var, state) = (&self.vars.vars()[index], &self.states[index]);
                let rule = rules[rule_index(self.group_of[index])].of(self.counts[index]);
                let (edit, is_finite) = (edit(index), entry.is_finite());
                let next = backend::candle_ops::step(
                    var,
                    grad,
                    state,
                    self.layout,
                    edit,
                    rule,
                    is_finite,
                )?;
                stepped.push((index, next));
            }
        }
        Ok(stepped)
    }

    /// Updates the Vars on CPU. Small ones run in parallel, many per task. Large ones run one at a
    /// time, as each is parallel inside. The order is from last to first, because measuring has
    /// left the last gradients in the cache.
    fn step_on_cpu(
        &mut self,
        entries: &[Entry<'_>],
        owned: &FxHashMap<usize, Tensor>,
        edit: &EditOf<'_>,
        rule: impl Fn(usize) -> StepRule + Sync,
    ) -> Result<()> {
        let (vars, layout) = (self.vars.vars(), self.layout);
        let one = |index: usize, state: &mut State| {
            let entry = &entries[index];
            let Some(grad) = readable(entry).filter(|_| entry.residency.is_cpu()) else {
                return Ok(());
            };
            let grad = owned.get(&index).unwrap_or(grad);
            backend::cpu::step(&vars[index], grad, state, layout, edit(index), rule(index))
        };
        let is_large = |index: usize| entries[index].elements > BLOCK;
        let work = self.vars.list().work;
        let tasks = self.states.chunks_mut(VARS_PER_TASK).enumerate().rev();
        for_each(work, tasks, |(task, states)| {
            let start = task * VARS_PER_TASK;
            let range = start..start + states.len();
            // Touches all headers first, so that their cache misses overlap.
            touch_headers(vars[range.clone()].iter().map(Var::as_tensor));
            touch_headers(entries[range].iter().filter_map(|entry| entry.grad));
            let small = states.iter_mut().enumerate().rev();
            let mut small = small.filter(|(i, _)| !is_large(start + i));
            small.try_for_each(|(i, state)| one(start + i, state))
        })?;
        let large = self.states.iter_mut().enumerate().rev();
        let large = large.filter(|(index, _)| is_large(*index));
        for_each_large(work, large, |(index, state)| one(index, state))
    }
}

/// The index of a group's rule among those of a step.
fn rule_index(group: Option<usize>) -> usize {
    group.map_or(0, |group| group + 1)
}

/// The update rules of the jobs, one for each pair of group and step count. Sets each job's index
/// into them.
fn rules_of(jobs: &mut [UpdateJob<'_>], rules: &[StepRule], counts: &[u64]) -> Vec<StepRule> {
    let mut own = Vec::new();
    let mut found = FxHashMap::default();
    for job in jobs {
        let (group, taken) = (job.rule, counts[job.index]);
        job.rule = *found.entry((group, taken)).or_insert_with(|| {
            own.push(rules[group].of(taken));
            own.len() - 1
        });
    }
    own
}

/// The device of all gradients, if it is a GPU that our kernels work on.
fn only_cuda(entries: &[Entry<'_>]) -> Option<Device> {
    let mut found = entries.iter().filter(|entry| entry.grad.is_some());
    let device = found.clone().find_map(readable)?.device();
    let is_there = |entry: &Entry<'_>| {
        let grad = entry.grad.filter(|_| entry.residency.is_cuda());
        grad.is_some_and(|grad| grad.device().same_device(device))
    };
    found.all(is_there).then(|| device.clone())
}
