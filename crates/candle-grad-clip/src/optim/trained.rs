//! What the fused optimizers share: the Vars, what is kept for each, and the walk that takes a step.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, TensorId, Var};
use candle_grad_clip_kernels::{BLOCK, Edit, GradEdit, NormType};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::backend::{self, Counted, DeviceSteps, StepResult, Stepped, UpdateJob};
use crate::clip::Edits;
use crate::error::Result;
use crate::gradients::{Entry, Place, Plan, Request, route_cuda_to_candle_ops};
use crate::groups::ParamGroups;
use crate::param_state::{Kept, State, StepRule};
use crate::pipeline::measure::walk;
use crate::tensors::touch_headers;
use crate::threads::{for_each, for_each_large};
use crate::vars::NamedVars;

/// Vars that one task updates.
const VARS_PER_TASK: usize = 64;

/// The edit of a Var's gradient, by the Var's place.
type EditOf<'a> = dyn Fn(usize) -> GradEdit<'a> + Sync + 'a;

/// Gradients that were collected already, and what to do to them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clipped<'a> {
    pub(crate) vars: &'a NamedVars,
    /// One for each of `vars`.
    pub(crate) entries: &'a [Entry<'a>],
    pub(crate) edits: &'a Edits,
    /// The edit of Vars that are not among `vars`.
    pub(crate) others: Edit,
}

/// The Vars that an optimizer trains.
#[derive(Debug)]
pub(crate) struct Trained {
    vars: NamedVars,
    /// One for each Var.
    states: Vec<State>,
    /// The steps that each Var has taken, those in which it had a gradient; as far as the host knows.
    counts: Arc<[u64]>,
    kept: Kept,
    groups: ParamGroups,
    /// The place of each Var's group, counted from 1; 0 for none.
    places: Arc<[usize]>,
    /// Steps taken, as far as the host knows: see `lead`.
    steps: u64,
    /// A GPU that decides the steps, and counts them.
    lead: Option<Box<dyn DeviceSteps>>,
    /// The names that were taken on last.
    adopted: Option<Arc<[String]>>,
}

/// What is saved.
#[derive(Debug)]
pub(crate) struct Snapshot<'a> {
    /// Steps taken.
    pub(crate) steps: u64,
    /// One for each Var.
    pub(crate) states: Vec<&'a State>,
    /// The steps that each Var has taken; 0 where its state is fresh.
    pub(crate) counts: Cow<'a, [u64]>,
}

impl Trained {
    pub(crate) fn new(vars: NamedVars, kept: Kept) -> Self {
        Self {
            states: vec![State::Fresh; vars.vars().len()],
            counts: vec![0; vars.vars().len()].into(),
            places: vec![0; vars.vars().len()].into(),
            vars,
            kept,
            groups: ParamGroups::default(),
            steps: 0,
            lead: None,
            adopted: None,
        }
    }

    pub(crate) fn vars(&self) -> &NamedVars {
        &self.vars
    }

    /// Steps taken. Where a GPU leads this waits for it, and what fails there shows in the next step: the number is then that of
    /// the time when it took the lead.
    pub(crate) fn steps(&self) -> u64 {
        let counted = self.lead.as_ref().map(|lead| lead.counted());
        counted.map_or(self.steps, |counted| {
            counted.map_or(self.steps, |counted| counted.steps)
        })
    }

    /// Whether a GPU decides the steps.
    pub(crate) fn gpu_leads(&self) -> bool {
        self.lead.is_some()
    }

    /// The next step's number, as far as the host knows.
    pub(crate) fn next_step(&self) -> u64 {
        self.steps + 1
    }

    /// The steps taken, and the state of each Var. Waits for a GPU that leads.
    pub(crate) fn snapshot(&self) -> Result<Snapshot<'_>> {
        static FRESH: State = State::Fresh;
        let (steps, counts) = match &self.lead {
            None => (self.steps, Cow::Borrowed(&*self.counts)),
            Some(lead) => {
                let counted = lead.counted()?;
                (counted.steps, Cow::Owned(counted.counts))
            }
        };
        let states = self.states.iter().zip(&*counts);
        let states = states.map(|(state, count)| if *count > 0 { state } else { &FRESH });
        Ok(Snapshot {
            steps,
            states: states.collect(),
            counts,
        })
    }

    /// Takes the lead back from a GPU that has it: waits for it.
    pub(crate) fn settle(&mut self) -> Result<()> {
        let Some(lead) = &self.lead else {
            return Ok(());
        };
        let counted = lead.counted()?;
        self.steps = counted.steps;
        self.counts = counted.counts.into();
        for (state, count) in self.states.iter_mut().zip(&*self.counts) {
            if *count == 0 {
                *state = State::Fresh;
            }
        }
        self.lead = None;
        Ok(())
    }

    pub(crate) fn kept(&self) -> Kept {
        self.kept
    }

    pub(crate) fn groups(&self) -> &ParamGroups {
        &self.groups
    }

    /// Takes on groups, by the names that the Vars have now.
    pub(crate) fn set_groups(&mut self, groups: ParamGroups) -> Result<()> {
        self.places = groups.assign(self.vars.names())?;
        self.groups = groups;
        Ok(())
    }

    /// Takes on the state of a checkpoint: one for each Var, with the arrays that `kept` says, and the steps that each Var
    /// has taken.
    pub(crate) fn restore(&mut self, kept: Kept, states: Vec<State>, steps: u64, counts: Vec<u64>) {
        self.lead = None;
        self.kept = kept;
        self.states = states;
        self.steps = steps;
        self.counts = counts.into();
    }

    /// The names of our Vars, those of `vars` first: what [`Trained::adopt`] would give them.
    pub(crate) fn names_as(&self, vars: &NamedVars) -> Vec<String> {
        let ids = vars.vars().iter().map(|var| var.id());
        let theirs: FxHashMap<TensorId, &String> = ids.zip(vars.names()).collect();
        let ours = self.vars.vars().iter().zip(self.vars.names());
        ours.map(|(var, name)| theirs.get(&var.id()).copied().unwrap_or(name).clone())
            .collect()
    }

    /// Forgets all state, and keeps other arrays from now on.
    pub(crate) fn restart(&mut self, kept: Kept) {
        self.lead = None;
        self.kept = kept;
        self.states.fill(State::Fresh);
        self.counts = vec![0; self.states.len()].into();
        self.steps = 0;
    }

    /// Whether the names are those of `vars` already.
    pub(crate) fn has_adopted(&self, vars: &NamedVars) -> bool {
        let seen = |names| Arc::ptr_eq(names, vars.shared_names());
        self.adopted.as_ref().is_some_and(seen)
    }

    /// Takes on the names of `vars`, and their order if they are the same Vars.
    pub(crate) fn adopt(&mut self, vars: &NamedVars) -> Result<()> {
        if self.has_adopted(vars) {
            return Ok(());
        }
        self.settle()?; // the GPU counts in the order that was
        self.adopted = Some(vars.shared_names().clone());
        let ids = self.vars.vars().iter().map(|var| var.id());
        let ours: FxHashMap<TensorId, usize> = ids.zip(0..).collect();
        let indices = vars.vars().iter().map(|var| ours.get(&var.id()).copied());
        let indices: Vec<Option<usize>> = indices.collect();
        let all: Option<Vec<usize>> = indices.iter().copied().collect();
        if let Some(order) = all.filter(|order| order.len() == ours.len()) {
            let mut states = std::mem::take(&mut self.states);
            let mut take = |i: usize| std::mem::replace(&mut states[i], State::Fresh);
            self.places = order.iter().map(|&i| self.places[i]).collect();
            self.counts = order.iter().map(|&i| self.counts[i]).collect();
            self.states = order.into_iter().map(&mut take).collect();
            self.vars = vars.clone();
            return Ok(());
        }
        let has_places = self.has_places_as(vars);
        let mut names = self.vars.names().to_vec();
        for (index, name) in indices.iter().zip(vars.names()) {
            if let Some(index) = index {
                names[*index].clone_from(name);
            }
        }
        let named = names.into_iter().zip(self.vars.vars().to_vec());
        self.vars = named.collect::<Vec<(String, Var)>>().into();
        self.vars.has_places = has_places;
        Ok(())
    }

    /// Whether one of our Vars has but a place for a name, once those of `vars` are taken on.
    pub(crate) fn has_places_as(&self, vars: &NamedVars) -> bool {
        let theirs: FxHashSet<TensorId> = vars.vars().iter().map(|var| var.id()).collect();
        let mut ours = self
            .vars
            .vars()
            .iter()
            .map(|var| theirs.contains(&var.id()));
        ours.any(|theirs| {
            if theirs {
                vars.has_places
            } else {
                self.vars.has_places
            }
        })
    }

    /// Takes a step by `rules`: the first for Vars without a group, then one for each group. Whatever can fail comes
    /// before the first write.
    pub(crate) fn step(
        &mut self,
        grads: &GradStore,
        clipped: Option<Clipped<'_>>,
        rules: &[StepRule],
    ) -> Result<()> {
        self.settle()?;
        match clipped {
            Some(Clipped {
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

    /// As [`Trained::step`], with gradients that are not collected yet, or of other Vars than ours: those of
    /// Vars that are not clipped are edited as `others` says.
    fn step_collecting(
        &mut self,
        grads: &GradStore,
        clipped: Option<Clipped<'_>>,
        rules: &[StepRule],
    ) -> Result<()> {
        let mut entries = walk(self.vars.list(), grads, None)?;
        if clipped.is_some_and(|clipped| clipped.edits.are_of_units()) {
            entries = route_cuda_to_candle_ops(entries);
        }
        let Some(clipped) = clipped else {
            return self.step_entries(&entries, &|_| Edit::NOTHING.into(), rules);
        };
        // An edit by candle's operations has to know whether all is finite.
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
        let owned = self.owned_gradients(entries)?;
        let stepped = self.step_elsewhere(entries, edit, rules)?;
        let started = self.start_states(entries)?;
        let (places, counts) = (self.places.clone(), self.counts.clone());
        let mut jobs = self.update_jobs(entries, &owned, &started, edit)?;
        if !jobs.is_empty() {
            let rules = rules_of(&mut jobs, rules, &counts);
            backend::cuda::update(&jobs, &rules)?;
        }
        // From here on nothing is expected to fail.
        for (index, state) in started {
            self.states[index] = state;
        }
        self.step_on_cpu(entries, &owned, edit, |index| {
            rules[places[index]].of(counts[index])
        })?;
        for (index, stepped) in stepped {
            self.vars.vars()[index].set(&stepped.param)?;
            self.states[index] = stepped.state;
        }
        drop(counts); // so that they are counted on in place
        let counts = Arc::make_mut(&mut self.counts).iter_mut();
        for (count, entry) in counts.zip(entries) {
            *count += u64::from(entry.grad.is_some() && entry.elements > 0);
        }
        Ok(())
    }

    /// Takes a step of a plain norm or value clip that the GPU decides, if it can: all gradients are on one. The result is
    /// read when it is asked for. `skips_in_a_row` is for a GPU that does not lead yet.
    pub(crate) fn step_on_device(
        &mut self,
        clipped: Clipped<'_>,
        plan: &Plan,
        rules: &[StepRule],
        skips_in_a_row: u32,
        keeps_norms: bool,
    ) -> Result<Option<Arc<dyn StepResult>>> {
        let Clipped {
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
        let owned = self.owned_gradients(entries)?;
        let leads = |lead: &dyn DeviceSteps| lead.device().same_device(&device);
        if !self.lead.as_ref().is_some_and(|lead| leads(&**lead)) {
            self.settle()?;
            let counted = Counted {
                steps: self.steps,
                skips_in_a_row,
                counts: self.counts.to_vec(),
            };
            self.lead = Some(backend::cuda::start_steps(&device, &counted)?);
        }
        // The GPU counts the steps of each Var, so the state of one that has taken none can be here already.
        for (index, state) in self.start_states(entries)? {
            self.states[index] = state;
        }
        let Some(mut lead) = self.lead.take() else {
            return Ok(None);
        };
        let jobs = self.update_jobs(entries, &owned, &[], &|index| edits.of(index));
        let result = jobs.and_then(|jobs| lead.step(&jobs, rules, plan, keeps_norms));
        self.lead = Some(lead);
        result.map(Some)
    }

    /// What our CUDA kernels are to update; `started` has the states of Vars that have none yet.
    fn update_jobs<'a>(
        &'a self,
        entries: &[Entry<'a>],
        owned: &'a FxHashMap<usize, Tensor>,
        started: &'a [(usize, State)],
        edit: &EditOf<'_>,
    ) -> Result<Vec<UpdateJob<'a>>> {
        let job = |(index, entry): (usize, &Entry<'a>)| {
            let grad = ours(entry).filter(|_| entry.place.is_cuda())?;
            let fresh = started.binary_search_by_key(&index, |(index, _)| *index);
            let edit = backend::expect_uniform_edit(edit(index));
            Some(edit.map(|edit| UpdateJob {
                var: &self.vars.vars()[index],
                grad: owned.get(&index).unwrap_or(grad),
                state: fresh.map_or(&self.states[index], |place| &started[place].1),
                kept: self.kept,
                edit,
                rule: self.places[index],
                is_first: self.counts[index] == 0,
                index,
            }))
        };
        entries.iter().enumerate().filter_map(job).collect()
    }

    /// Copies of the gradients that our kernels can't read while they write Vars: those that are not
    /// contiguous, and those that share storage with a Var.
    fn owned_gradients(&self, entries: &[Entry<'_>]) -> Result<FxHashMap<usize, Tensor>> {
        let storages = self.vars.list().storages();
        let mut owned = FxHashMap::default();
        for (index, entry) in entries.iter().enumerate() {
            let Some(grad) = ours(entry) else { continue };
            if !entry.place.is_in_place() || storages.contains(&entry.storage) {
                owned.insert(index, grad.force_contiguous()?);
            }
        }
        Ok(owned)
    }

    /// The first state of the Vars that our kernels update for the first time, in their order.
    fn start_states(&self, entries: &[Entry<'_>]) -> Result<Vec<(usize, State)>> {
        let mut started = Vec::new();
        for (index, (entry, state)) in entries.iter().zip(&self.states).enumerate() {
            if matches!(state, State::Fresh) && ours(entry).is_some() {
                let state = State::start(&self.vars.vars()[index], self.kept)?;
                started.push((index, state));
            }
        }
        Ok(started)
    }

    /// The next values and states of the Vars that candle's operations update. On the caller's thread, since
    /// candle's CUDA devices use a stream per thread.
    fn step_elsewhere(
        &self,
        entries: &[Entry<'_>],
        edit: &EditOf<'_>,
        rules: &[StepRule],
    ) -> Result<Vec<(usize, Stepped)>> {
        let mut stepped = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            let Some(grad) = entry.grad else { continue };
            if entry.place == Place::Elsewhere && entry.elements > 0 {
                let (var, state) = (&self.vars.vars()[index], &self.states[index]);
                let rule = rules[self.places[index]].of(self.counts[index]);
                let (edit, is_finite) = (edit(index), entry.is_finite());
                let next =
                    backend::candle_ops::step(var, grad, state, self.kept, edit, rule, is_finite)?;
                stepped.push((index, next));
            }
        }
        Ok(stepped)
    }

    /// Updates the Vars on CPU, small ones in parallel, a task for many; each large one by itself, as it is parallel
    /// inside. From the last to the first: measuring has left the last gradients in the cache.
    fn step_on_cpu(
        &mut self,
        entries: &[Entry<'_>],
        owned: &FxHashMap<usize, Tensor>,
        edit: &EditOf<'_>,
        rule: impl Fn(usize) -> StepRule + Sync,
    ) -> Result<()> {
        let (vars, kept) = (self.vars.vars(), self.kept);
        let one = |index: usize, state: &mut State| {
            let entry = &entries[index];
            let Some(grad) = ours(entry).filter(|_| entry.place.is_cpu()) else {
                return Ok(());
            };
            let grad = owned.get(&index).unwrap_or(grad);
            backend::cpu::step(&vars[index], grad, state, kept, edit(index), rule(index))
        };
        let is_large = |index: usize| entries[index].elements > BLOCK;
        let work = self.vars.list().work;
        let tasks = self.states.chunks_mut(VARS_PER_TASK).enumerate().rev();
        for_each(work, tasks, |(task, states)| {
            let start = task * VARS_PER_TASK;
            let range = start..start + states.len();
            // The headers first, all of them: their cache misses overlap here.
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

/// The equations of the jobs' Vars, once for each group and number of steps taken; the jobs get their places.
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
    let device = found.clone().find_map(ours)?.device();
    let is_there = |entry: &Entry<'_>| {
        let grad = entry.grad.filter(|_| entry.place.is_cuda());
        grad.is_some_and(|grad| grad.device().same_device(device))
    };
    found.all(is_there).then(|| device.clone())
}

/// The gradient, if our kernels are to read it.
fn ours<'g>(entry: &Entry<'g>) -> Option<&'g Tensor> {
    entry
        .grad
        .filter(|_| entry.place != Place::Elsewhere && entry.elements > 0)
}
