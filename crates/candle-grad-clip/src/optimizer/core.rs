//! The state of a wrapper, apart from its inner optimizer.

use candle_core::{DType, Device, Tensor};

use super::counters::Counters;
use super::inner::Inner;
use super::missing::Missing;
use super::pending::PendingSteps;
use super::report::StepReport;
use super::tiny_coefs::TinyCoefs;
use super::trained_vars::TrainedVars;
use crate::clip::{Clip, Policy};
use crate::error::{Error, Result};
use crate::groups::ParamGroups;
use crate::loss_scaler::LossScaler;
use crate::pipeline::edit::Scratch;
use crate::vars::NamedVars;

/// `limit(step)`.
pub(super) struct Schedule(pub(super) Box<dyn Fn(u64) -> f64 + Send + Sync>);

pub(crate) struct Core {
    pub(crate) vars: NamedVars,
    pub(crate) trained: TrainedVars,
    pub(crate) policy: Policy,
    /// The limit of each step, which replaces the clip's.
    pub(super) schedule: Option<Schedule>,
    pub(super) missing: Missing,
    pub(super) with_param_norms: bool,
    pub(crate) loss_scaler: Option<LossScaler>,
    /// The number of the last step, taken or skipped.
    pub(crate) step: u64,
    pub(crate) counters: Counters,
    pub(crate) pending: PendingSteps,
    /// Buffers for copies of gradients in `step(&GradStore)`.
    pub(super) scratch: Scratch,
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
        vars.check_devices()?;
        let (trained, vars) = TrainedVars::new(&inner, inner_name, vars, allow_unclipped)?;
        let policy = Policy::new(clip, &vars)?;
        if let Inner::Fused(parts) = &mut inner {
            trained.adopt(parts, &vars)?;
            // Another wrapper's skips don't count here.
            parts.try_for_each(|fused| fused.trained_mut().sync_counters())?;
        }
        Ok(Self {
            vars,
            trained,
            policy,
            schedule: None,
            missing: Missing::default(),
            with_param_norms: false,
            loss_scaler: None,
            step: 0,
            counters: Counters::default(),
            pending: PendingSteps::default(),
            scratch: Scratch::default(),
            last_report: None,
        })
    }

    pub(super) fn set_groups(
        &mut self,
        inner: &mut Inner<'_>,
        groups: ParamGroups,
        inner_name: &'static str,
    ) -> Result<()> {
        let names = self.vars.names();
        let limits = self.policy.limits_of(groups.clone(), names)?;
        if let Inner::Fused(parts) = inner {
            self.trained.adopt(parts, &self.vars)?;
        }
        // Each optimizer of a pair knows its own Vars only, so it has its own groups.
        let single = match inner {
            Inner::Fused(parts) => parts.single(),
            Inner::Foreign(_) => None,
        };
        if let Some(fused) = single {
            fused.trained_mut().set_groups(groups)?;
        } else if let Some(group) = groups.iter().find(|group| group.has_rates()) {
            return Err(Error::GroupsNeedFused {
                group: group.name().to_string(),
                optimizer: inner_name,
            });
        }
        self.policy.set_limits(limits);
        Ok(())
    }

    pub(super) fn set_schedule(&mut self, schedule: Schedule) -> Result<()> {
        self.policy.expect_schedule()?;
        self.schedule = Some(schedule);
        Ok(())
    }

    pub(crate) fn steps_taken(&self) -> Result<u64> {
        Ok(self.counters.steps_taken + self.pending.steps_taken()?)
    }

    /// The current number of skips in a row. Waits until a GPU has decided its launched steps.
    pub(crate) fn skips_in_a_row(&self) -> Result<u32> {
        let last = self.pending.skips_in_a_row()?;
        Ok(last.unwrap_or(self.counters.skips.in_a_row))
    }

    /// Drops the results of earlier steps, when a checkpoint is loaded.
    pub(crate) fn forget_last_steps(&mut self) {
        self.pending = PendingSteps::default();
        self.counters.tiny_coefs = TinyCoefs::default();
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

    /// The loss as a number, read from its device, if the rule uses it.
    pub(super) fn loss_value(&self, loss: &Tensor) -> Result<Option<f64>> {
        if !self.policy.reads_loss() {
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
