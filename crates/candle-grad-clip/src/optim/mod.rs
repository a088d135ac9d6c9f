//! Fused optimizers: the clip is folded into the update.
//!
//! [`AdamW`] and [`Sgd`] are drop-ins for candle's, alone or in a
//! [`ClippedOptimizer`](crate::ClippedOptimizer), which knows them by type: the coefficient (or the bound, or the
//! zero for what is not finite) then goes into the update. Each gradient is read once for the norm and once for the
//! step, nothing is written to it, and nothing of its size is allocated: 8 words of memory traffic a parameter
//! for clip and AdamW, 4 for clip and SGD. A skipped step touches neither weights nor moments nor the step counter.
//! [`StepReport::path`](crate::StepReport::path) is then [`StepPath::Fused`](crate::StepPath::Fused).
//!
//! # Precision
//! f64 Vars are updated in f64, f32 Vars in f32, f16 and bf16 Vars in f32 with moments in f32: the result is rounded
//! once, to the nearest. Without `master_weights(true)` what an update is smaller than half a unit in the last
//! place of its weight is lost: a bf16 weight has 8 significant bits, so updates below 1/512 of it vanish, step after
//! step. With it, an f32 copy of each half-precision Var takes the updates, and the Var is its rounded value; 4 more
//! bytes a parameter.
//!
//! # In place
//! On CPU Vars are updated in place, so tensors that share their storage see the update, as with `Var::set`. Elsewhere
//! candle's operations make the new values, all of them before the first is put in place.
//!
//! # Failure
//! Everything is checked before the first write: hyper-parameters, shapes, dtypes, devices. A step that returns an
//! error has changed nothing. (What no library can promise: a GPU fault that shows later.)

mod adamw;
mod groups;
mod per_group;
mod sgd;
pub(crate) mod state;
mod trained;

use std::any::Any;

use candle_core::backprop::GradStore;
use candle_grad_clip_kernels as kernels;

pub use adamw::AdamW;
pub use groups::{ParamGroup, ParamGroups};
pub use per_group::PerGroup;
pub use sgd::{ParamsSgd, Sgd};
pub(crate) use trained::Clipped;

use crate::{Error, NamedVars, Result};
use trained::Trained;

/// The equation of a step, with its numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StepRule {
    AdamW(kernels::AdamW),
    Sgd(kernels::Sgd),
}

impl StepRule {
    /// The equation for a Var in its first step, or in a later one.
    fn of(mut self, is_first: bool) -> Self {
        if let Self::Sgd(sgd) = &mut self {
            sgd.is_first = is_first;
        }
        self
    }
}

/// What the wrapper and candle's trait need of a fused optimizer.
pub(crate) trait Fused: 'static {
    /// The equation of the next step, once its numbers are checked, for Vars of no group (`None`) or of one.
    fn next_rule(&self, group: Option<&ParamGroup>) -> Result<StepRule>;
    fn trained(&self) -> &Trained;
    fn trained_mut(&mut self) -> &mut Trained;

    /// Takes a step; with `clipped`, on gradients edited as that says.
    fn fused_step(&mut self, grads: &GradStore, clipped: Option<Clipped<'_>>) -> Result<()> {
        let groups = self.trained().groups().clone();
        let all = std::iter::once(None).chain(groups.iter().map(Some));
        let rules: Vec<StepRule> = all
            .map(|group| self.next_rule(group))
            .collect::<Result<_>>()?;
        self.trained_mut().step(grads, clipped, &rules)
    }

    /// Takes on the wrapper's names, and its order if the Vars are the same.
    fn adopt(&mut self, vars: &NamedVars) {
        self.trained_mut().adopt(vars);
    }
}

/// The optimizer as one of ours, whichever constructor made it.
pub(crate) fn fused<O: 'static>(optimizer: &mut O) -> Option<&mut dyn Fused> {
    let optimizer: &mut dyn Any = optimizer;
    // Asked twice, as a borrow that is returned from one branch would last through the other.
    if optimizer.is::<AdamW>() {
        return optimizer.downcast_mut::<AdamW>().map(|o| o as _);
    }
    optimizer.downcast_mut::<Sgd>().map(|o| o as _)
}

/// Groups for an optimizer by itself, which clips nothing.
fn check_no_limits(groups: &ParamGroups) -> Result<()> {
    for group in groups {
        if let Some(max_norm) = group.limit() {
            return Err(Error::InvalidOption {
                name: "max_norm",
                value: max_norm,
                expected: "none in the groups of an optimizer by itself: give them to a ClippedOptimizer around it",
            });
        }
    }
    Ok(())
}

/// A hyper-parameter that must be finite, and 0 or above.
fn check_not_negative(name: &'static str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::InvalidOption {
        name,
        value,
        expected: "0 or a finite value above",
    })
}

/// A hyper-parameter that is a share of what is kept.
fn check_decay(name: &'static str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::InvalidOption {
        name,
        value,
        expected: "0 or above, and below 1",
    })
}
