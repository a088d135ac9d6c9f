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
