//! All of a wrapper but its inner optimizer, and its settings.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::frozen::TinyCoefs;
use super::inner::Inner;
use super::missing::Missing;
use super::pending::PendingSteps;
use super::report::StepReport;
use super::schedule::Schedule;
use super::skips::Skips;
use super::trained_vars::TrainedVars;
use crate::clip::{Clip, ClipRule, Limits, RuleState};
use crate::error::{Error, Result};
use crate::gradients::UnitPlan;
use crate::groups::ParamGroups;
use crate::loss_scaler::LossScaler;
use crate::pipeline::edit::Scratch;
use crate::vars::NamedVars;

pub(crate) struct Core {
    pub(crate) vars: NamedVars,
    pub(crate) trained: TrainedVars,
    pub(crate) clip: Clip,
    /// What the clip remembers of the steps that were taken.
    pub(crate) rule: RuleState,
    /// If the clip has a rule for units.
    pub(crate) units: Option<Arc<UnitPlan>>,
    /// The limit of each step, in place of the clip's.
    pub(crate) schedule: Option<Schedule>,
    /// A rule of the user's, in place of the clip's.
    pub(crate) own: Option<Box<dyn ClipRule>>,
    pub(crate) limits: Limits,
    pub(super) missing: Missing,
    pub(super) with_param_norms: bool,
    pub(crate) loss_scaler: Option<LossScaler>,
    /// The number of the last step, taken or skipped.
    pub(crate) step: u64,
    /// Steps taken, as far as the host knows: `pending` counts those that a GPU decided.
    pub(crate) steps_taken: u64,
    pub(crate) skips: Skips,
    pub(crate) pending: PendingSteps,
    /// Copies of gradients for `step(&GradStore)`.
    pub(super) scratch: Scratch,
    pub(crate) tiny_coefs: TinyCoefs,
    pub(crate) last_report: Option<StepReport>,
}

impl Core {
    pub(super) fn new(
        mut inner: Inner<'_>,
        inner_name: &'static str,
        vars: NamedVars,
        clip: Clip,
        allow_unclipped: &[&str],
    ) -> Result<Self> {
        clip.check()?;
        vars.check_devices()?;
        let (trained, vars) = TrainedVars::new(&inner, inner_name, vars, allow_unclipped)?;
        let units = clip.unit_plan(&vars)?;
        if let Inner::Fused(fused) = &mut inner {
            trained.adopt(*fused, &vars)?;
            fused.trained_mut().settle()?; // another wrapper's skips are not ours
        }
        Ok(Self {
            vars,
            trained,
            clip,
            rule: RuleState::default(),
            units,
            schedule: None,
            own: None,
            limits: Limits::default(),
            missing: Missing::default(),
            with_param_norms: false,
            loss_scaler: None,
            step: 0,
            steps_taken: 0,
            skips: Skips::default(),
            pending: PendingSteps::default(),
            scratch: Scratch::default(),
            tiny_coefs: TinyCoefs::default(),
            last_report: None,
        })
    }

    pub(super) fn set_clip(&mut self, clip: Clip) -> Result<()> {
        clip.check()?;
        clip.check_groups(self.limits.groups().has_limits())?;
        clip.check_no_clip(self.limits.groups())?;
        if self.schedule.is_some() {
            clip.check_schedule()?;
        }
        if self.own.is_some() {
            check_no_clip_beside_rule(&clip)?;
        }
        self.units = clip.unit_plan(&self.vars)?;
        clip.adapt(&mut self.rule);
        self.clip = clip;
        Ok(())
    }

    pub(super) fn set_groups(
        &mut self,
        inner: &mut Inner<'_>,
        groups: ParamGroups,
        inner_name: &'static str,
    ) -> Result<()> {
        self.clip.check_groups(groups.has_limits())?;
        self.clip.check_no_clip(&groups)?;
        let limits = Limits::new(groups.clone(), self.vars.names())?;
        if let Inner::Fused(fused) = inner {
            self.trained.adopt(*fused, &self.vars)?;
            fused.trained_mut().set_groups(groups)?;
        } else if let Some(group) = groups.iter().find(|group| group.has_rates()) {
            return Err(Error::GroupsNeedFused {
                group: group.name().to_string(),
                optimizer: inner_name,
            });
        }
        self.limits = limits;
        Ok(())
    }

    pub(super) fn set_rule(&mut self, rule: Box<dyn ClipRule>) -> Result<()> {
        check_no_clip_beside_rule(&self.clip)?;
        self.own = Some(rule);
        Ok(())
    }

    pub(super) fn set_schedule(&mut self, schedule: Schedule) -> Result<()> {
        self.clip.check_schedule()?;
        self.schedule = Some(schedule);
        Ok(())
    }

    pub(crate) fn steps_taken(&self) -> Result<u64> {
        Ok(self.steps_taken + self.pending.steps_taken()?)
    }

    /// The skips in a row, once a GPU that decides has decided all steps.
    pub(crate) fn skips_in_a_row(&self) -> Result<u32> {
        let last = self.pending.skips_in_a_row()?;
        Ok(last.unwrap_or(self.skips.in_a_row))
    }

    /// What the steps before a load have left.
    pub(crate) fn forget_last_steps(&mut self) {
        self.pending = PendingSteps::default();
        self.tiny_coefs = TinyCoefs::default();
        self.last_report = None;
    }

    pub(super) fn loss_scale(&self) -> f64 {
        let scaler = self.loss_scaler.as_ref();
        scaler.map_or(1.0, LossScaler::current_scale)
    }

    pub(super) fn scale_loss(&self, loss: &Tensor) -> Result<Tensor> {
        match &self.loss_scaler {
            Some(scaler) => scaler.scale(loss),
            None => Ok(loss.clone()),
        }
    }

    /// The loss as a number, read from its device, if the rule looks at it.
    pub(super) fn loss_value(&self, loss: &Tensor) -> Result<Option<f64>> {
        let own = self.own.as_ref();
        if !self.clip.reads_loss() && !own.is_some_and(|own| own.reads_loss()) {
            return Ok(None);
        }
        if loss.elem_count() != 1 {
            return Err(Error::LossShape {
                shape: loss.dims().to_vec(),
            });
        }
        let value = loss.detach().to_device(&Device::Cpu)?;
        let value = value.to_dtype(DType::F64)?.flatten_all()?;
        Ok(Some(value.to_vec1::<f64>()?[0]))
    }
}

/// The clip beside a rule of the user's.
pub(crate) fn check_no_clip_beside_rule(clip: &Clip) -> Result<()> {
    if clip.is_none() {
        return Ok(());
    }
    Err(Error::InvalidClip {
        text: clip.to_string(),
        reason: "a ClipRule decides here, expected none (which may have norm_type, non_finite and max_skips)"
            .to_string(),
    })
}
