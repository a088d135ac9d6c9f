//! What the wrapper, checkpoints and candle's trait need of a fused optimizer.

use std::sync::Arc;

use candle_core::backprop::GradStore;

use super::param_states::ParamStates;
use super::params::Settings;
use super::update::Clipped;
use crate::backend::StepResult;
use crate::error::Result;
use crate::gradients::Plan;
use crate::groups::ParamGroup;
use crate::param_state::{State, StepRule};
use crate::vars::NamedVars;

/// What an optimizer takes on from a file.
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
    /// The equation of the next step, once its numbers are checked, for Vars of no group (`None`)
    /// or of one.
    fn next_rule(&self, group: Option<&ParamGroup>) -> Result<StepRule>;
    fn trained(&self) -> &ParamStates;
    fn trained_mut(&mut self) -> &mut ParamStates;
    /// What checkpoints hold beside the state.
    fn settings(&self) -> Settings;
    /// Takes on the hyper-parameters of a checkpoint of the same kind of optimizer.
    fn set_settings(&mut self, settings: Settings);

    /// Takes on what a checkpoint holds; it was read for this optimizer, and checked.
    fn restore(&mut self, loaded: Loaded) {
        let kept = loaded.settings.kept();
        self.trained_mut()
            .restore(kept, loaded.states, loaded.steps, loaded.counts);
        self.set_settings(loaded.settings);
    }

    /// Takes a step; with `clipped`, on gradients edited as that says.
    fn fused_step(&mut self, grads: &GradStore, clipped: Option<Clipped<'_>>) -> Result<()> {
        self.trained_mut().settle()?; // before its steps are counted
        let rules = self.next_rules()?;
        self.trained_mut().step(grads, clipped, &rules)
    }

    /// As [`fused_step`](Fused::fused_step) with a clip that a GPU decides, if it can: see
    /// [`ParamStates::step_on_device`].
    fn device_step(
        &mut self,
        clipped: Clipped<'_>,
        plan: &Plan,
        skips_in_a_row: u32,
        keeps_norms: bool,
    ) -> Result<Option<Arc<dyn StepResult>>> {
        let rules = self.next_rules()?;
        self.trained_mut()
            .step_on_device(clipped, plan, &rules, skips_in_a_row, keeps_norms)
    }

    /// The equations of the next step: for Vars of no group, then for those of each.
    fn next_rules(&self) -> Result<Vec<StepRule>> {
        let all = std::iter::once(None).chain(self.trained().groups().iter().map(Some));
        all.map(|group| self.next_rule(group)).collect()
    }

    /// Takes on the wrapper's names, and its order if the Vars are the same.
    fn adopt(&mut self, vars: &NamedVars) -> Result<()> {
        self.trained_mut().adopt(vars)
    }
}
