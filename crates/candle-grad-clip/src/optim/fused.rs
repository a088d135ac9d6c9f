//! The internal interface of the fused optimizers.

use std::sync::Arc;

use candle_core::backprop::GradStore;

use super::param_states::ParamStates;
use super::params::Settings;
use super::update::GradEdits;
use crate::backend::StepResult;
use crate::error::Result;
use crate::gradients::Plan;
use crate::groups::ParamGroup;
use crate::param_state::{State, StepRule};
use crate::vars::NamedVars;

/// The contents of a checkpoint, for one optimizer.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) settings: Settings,
    pub(crate) steps: u64,
    /// One for each of the optimizer's Vars.
    pub(crate) states: Vec<State>,
    /// The steps that each of them has taken.
    pub(crate) counts: Vec<u64>,
}

/// A fused optimizer.
pub(crate) trait Fused: 'static {
    /// Checks the hyper-parameters, and returns the update rule of the next step for a group, or
    /// for Vars without a group (`None`).
    fn next_rule(&self, group: Option<&ParamGroup>) -> Result<StepRule>;
    fn trained(&self) -> &ParamStates;
    fn trained_mut(&mut self) -> &mut ParamStates;
    /// The hyper-parameters and options that checkpoints hold.
    fn settings(&self) -> Settings;
    /// Sets the hyper-parameters from a checkpoint of the same kind of optimizer.
    fn set_settings(&mut self, settings: Settings);

    /// Restores a checkpoint, which was read for this optimizer and checked.
    fn restore(&mut self, loaded: Loaded) {
        let layout = loaded.settings.layout();
        self.trained_mut()
            .restore(layout, loaded.states, loaded.steps, loaded.counts);
        self.set_settings(loaded.settings);
    }

    /// Takes a step. With `clipped`, the gradients are edited as it says.
    fn fused_step(&mut self, grads: &GradStore, clipped: Option<GradEdits<'_>>) -> Result<()> {
        self.trained_mut().sync_counters()?; // first, as it updates the step counters
        let rules = self.next_rules()?;
        self.trained_mut().step(grads, clipped, &rules)
    }

    /// Like [`fused_step`](Fused::fused_step), but a GPU decides the clip, if it can: see
    /// [`ParamStates::step_on_device`].
    fn device_step(
        &mut self,
        clipped: GradEdits<'_>,
        plan: &Plan,
        skips_in_a_row: u32,
        keeps_norms: bool,
    ) -> Result<Option<Arc<dyn StepResult>>> {
        let rules = self.next_rules()?;
        self.trained_mut()
            .step_on_device(clipped, plan, &rules, skips_in_a_row, keeps_norms)
    }

    /// The update rules of the next step: for Vars without a group, then for each group.
    fn next_rules(&self) -> Result<Vec<StepRule>> {
        let all = std::iter::once(None).chain(self.trained().groups().iter().map(Some));
        all.map(|group| self.next_rule(group)).collect()
    }

    /// Adopts the wrapper's names, and its order if the Vars are the same.
    fn adopt(&mut self, vars: &NamedVars) -> Result<()> {
        self.trained_mut().adopt(vars)
    }
}

/// The fused optimizers in an inner optimizer: one, or two with different Vars.
pub(crate) struct FusedParts<'o> {
    first: &'o mut dyn Fused,
    second: Option<&'o mut dyn Fused>,
}

impl<'o> FusedParts<'o> {
    pub(crate) fn one(first: &'o mut dyn Fused) -> Self {
        Self {
            first,
            second: None,
        }
    }

    pub(crate) fn two(first: &'o mut dyn Fused, second: &'o mut dyn Fused) -> Self {
        Self {
            first,
            second: Some(second),
        }
    }

    /// The optimizer, if there is only one.
    pub(crate) fn single(&mut self) -> Option<&mut dyn Fused> {
        match self.second {
            None => Some(&mut *self.first),
            Some(_) => None,
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &dyn Fused> {
        let second = self.second.as_deref();
        std::iter::once(&*self.first).chain(second)
    }

    /// Calls `each` for every part.
    pub(crate) fn try_for_each(
        &mut self,
        mut each: impl FnMut(&mut dyn Fused) -> Result<()>,
    ) -> Result<()> {
        each(&mut *self.first)?;
        match &mut self.second {
            Some(second) => each(&mut **second),
            None => Ok(()),
        }
    }

    /// Restores a checkpoint, which was read for these parts and checked.
    pub(crate) fn restore(&mut self, loaded: Vec<Loaded>) {
        let mut loaded = loaded.into_iter();
        let parts = [Some(&mut *self.first), self.second.as_deref_mut()];
        for (fused, loaded) in parts.into_iter().flatten().zip(loaded.by_ref()) {
            fused.restore(loaded);
        }
    }

    /// Takes a step of every part. All hyper-parameters are checked before the first write.
    pub(crate) fn step(&mut self, grads: &GradStore, clipped: GradEdits<'_>) -> Result<()> {
        if self.second.is_some() {
            self.try_for_each(|fused| {
                fused.trained_mut().sync_counters()?;
                fused.next_rules().map(drop)
            })?;
        }
        self.try_for_each(|fused| fused.fused_step(grads, Some(clipped)))
    }
}
