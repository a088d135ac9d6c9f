//! The Vars that an optimizer trains, with the state of each.

use std::borrow::Cow;
use std::fmt::{self, DebugStruct};
use std::sync::Arc;

use candle_core::{TensorId, Var};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::backend::DeviceSteps;
use crate::error::Result;
use crate::groups::ParamGroups;
use crate::param_state::{State, StateLayout};
use crate::vars::NamedVars;

/// The Vars that an optimizer trains.
#[derive(Debug)]
pub(crate) struct ParamStates {
    pub(super) vars: NamedVars,
    /// One for each Var.
    pub(super) states: Vec<State>,
    /// The steps of each Var: those in which it had a gradient. Outdated while `device_steps` is
    /// set.
    pub(super) counts: Arc<[u64]>,
    pub(super) layout: StateLayout,
    groups: ParamGroups,
    /// Each Var's group, if it is in one.
    pub(super) group_of: Arc<[Option<usize>]>,
    /// Steps taken. Outdated while `device_steps` is set.
    pub(super) steps: u64,
    /// Set while a GPU decides and counts the steps.
    pub(super) device_steps: Option<Box<dyn DeviceSteps>>,
    /// The names that were adopted last.
    adopted: Option<Arc<[String]>>,
}

/// The state to save.
#[derive(Debug)]
pub(crate) struct Snapshot<'a> {
    /// Steps taken.
    pub(crate) steps: u64,
    /// One for each Var.
    pub(crate) states: Vec<&'a State>,
    /// The steps that each Var has taken; 0 if its state is fresh.
    pub(crate) counts: Cow<'a, [u64]>,
}

impl ParamStates {
    pub(crate) fn new(vars: NamedVars, layout: StateLayout) -> Self {
        Self {
            states: vec![State::Fresh; vars.vars().len()],
            counts: vec![0; vars.vars().len()].into(),
            group_of: vec![None; vars.vars().len()].into(),
            vars,
            layout,
            groups: ParamGroups::default(),
            steps: 0,
            device_steps: None,
            adopted: None,
        }
    }

    pub(crate) fn vars(&self) -> &NamedVars {
        &self.vars
    }

    /// Steps taken. If a GPU counts them, this waits for it. If that fails, the next step returns
    /// the error, and this returns the count from before the GPU started to count.
    pub(crate) fn steps(&self) -> u64 {
        let counted = self.device_steps.as_ref().map(|steps| steps.counted());
        counted.map_or(self.steps, |counted| {
            counted.map_or(self.steps, |counted| counted.steps)
        })
    }

    /// Whether a GPU decides the steps.
    pub(crate) fn gpu_owns_counters(&self) -> bool {
        self.device_steps.is_some()
    }

    /// The next step's number, as far as the host knows.
    pub(crate) fn next_step(&self) -> u64 {
        self.steps + 1
    }

    /// The steps taken, and the state of each Var. Waits for a GPU that counts the steps.
    pub(crate) fn snapshot(&self) -> Result<Snapshot<'_>> {
        static FRESH: State = State::Fresh;
        let (steps, counts) = match &self.device_steps {
            None => (self.steps, Cow::Borrowed(&*self.counts)),
            Some(steps) => {
                let counted = steps.counted()?;
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

    /// Copies the counters back from a GPU that has them, and ends its deciding. Waits for the GPU.
    pub(crate) fn sync_counters(&mut self) -> Result<()> {
        let Some(steps) = &self.device_steps else {
            return Ok(());
        };
        let counted = steps.counted()?;
        self.steps = counted.steps;
        self.counts = counted.counts.into();
        for (state, count) in self.states.iter_mut().zip(&*self.counts) {
            if *count == 0 {
                *state = State::Fresh;
            }
        }
        self.device_steps = None;
        Ok(())
    }

    pub(crate) fn layout(&self) -> StateLayout {
        self.layout
    }

    pub(crate) fn groups(&self) -> &ParamGroups {
        &self.groups
    }

    /// Sets the groups, by the Vars' current names.
    pub(crate) fn set_groups(&mut self, groups: ParamGroups) -> Result<()> {
        self.group_of = groups.group_of(self.vars.names())?;
        self.groups = groups;
        Ok(())
    }

    /// Replaces the state by that of a checkpoint: for each Var its arrays, as `layout` says, and its
    /// steps.
    pub(crate) fn restore(
        &mut self,
        layout: StateLayout,
        states: Vec<State>,
        steps: u64,
        counts: Vec<u64>,
    ) {
        self.device_steps = None;
        self.layout = layout;
        self.states = states;
        self.steps = steps;
        self.counts = counts.into();
    }

    /// The names that our Vars would have after [`ParamStates::adopt`].
    pub(crate) fn names_as(&self, vars: &NamedVars) -> Vec<String> {
        let ids = vars.vars().iter().map(|var| var.id());
        let theirs: FxHashMap<TensorId, &String> = ids.zip(vars.names()).collect();
        let ours = self.vars.vars().iter().zip(self.vars.names());
        ours.map(|(var, name)| theirs.get(&var.id()).copied().unwrap_or(name).clone())
            .collect()
    }

    /// Drops all state, and keeps the arrays of `layout` from now on.
    pub(crate) fn restart(&mut self, layout: StateLayout) {
        self.device_steps = None;
        self.layout = layout;
        self.states.fill(State::Fresh);
        self.counts = vec![0; self.states.len()].into();
        self.steps = 0;
    }

    /// Whether the names of `vars` were adopted last.
    pub(crate) fn has_adopted(&self, vars: &NamedVars) -> bool {
        let seen = |names| Arc::ptr_eq(names, vars.shared_names());
        self.adopted.as_ref().is_some_and(seen)
    }

    /// Adopts the names of `vars`, and their order if they are the same Vars.
    pub(crate) fn adopt(&mut self, vars: &NamedVars) -> Result<()> {
        if self.has_adopted(vars) {
            return Ok(());
        }
        self.sync_counters()?; // the GPU counts in the old order
        self.adopted = Some(vars.shared_names().clone());
        let ids = self.vars.vars().iter().map(|var| var.id());
        let ours: FxHashMap<TensorId, usize> = ids.zip(0..).collect();
        let indices = vars.vars().iter().map(|var| ours.get(&var.id()).copied());
        let indices: Vec<Option<usize>> = indices.collect();
        let all: Option<Vec<usize>> = indices.iter().copied().collect();
        if let Some(order) = all.filter(|order| order.len() == ours.len()) {
            let mut states = std::mem::take(&mut self.states);
            let mut take = |i: usize| std::mem::replace(&mut states[i], State::Fresh);
            self.group_of = order.iter().map(|&i| self.group_of[i]).collect();
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

    /// Whether one of our Vars would be named by its index after adopting `vars`.
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

    /// The last fields of an optimizer's `Debug`: without state, which is as large as the model.
    pub(super) fn finish_debug(&self, f: &mut DebugStruct<'_, '_>) -> fmt::Result {
        f.field("master_weights", &self.layout.master_weights)
            .field("vars", &self.vars.vars().len())
            .field("steps", &self.steps())
            .finish_non_exhaustive()
    }
}
