//! `save` and `load` of an optimizer in a [`ClippedOptimizer`].

use std::path::Path;

use super::header::WrapperRecord;
use super::load::load;
use super::save::save;
#[cfg(doc)]
use crate::clip::Clip;
use crate::error::Result;
use crate::loss_scaler::LossScaler;
use crate::optim::{self, FusedParts};
use crate::optimizer::ClippedOptimizer;

/// Checkpoints, for the optimizers that support them.
impl<O: optim::Checkpoint> ClippedOptimizer<O> {
    /// Saves the inner optimizer like its own `save`. The file also has the [`Clip`] with its
    /// history, the counters (steps, taken steps, skips in a row) and the [`LossScaler`]. It does
    /// not have the weights (see [`optim`](crate::optim#checkpoints)).
    ///
    /// # Errors
    /// As [`optim::AdamW::save`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_with(path.as_ref(), false)
    }

    /// Like [`save`](Self::save), but also saves NaN or infinite state: see
    /// [`optim::AdamW::save_non_finite`].
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_non_finite(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_with(path.as_ref(), true)
    }

    fn save_with(&self, path: &Path, non_finite: bool) -> Result<()> {
        let core = &self.core;
        let wrapper = WrapperRecord {
            clip: core.policy.clip().clone(),
            rule: core.policy.record(core.vars.names()),
            step: core.step,
            steps_taken: core.steps_taken()?,
            skips_in_a_row: core.skips_in_a_row()?,
            loss_scaler: core.loss_scaler.as_ref().map(|scaler| scaler.0.clone()),
            own_rule: core.policy.custom_record(),
        };
        save(path, &self.inner, Some((&core.vars, wrapper)), non_finite)
    }

    /// Restores what [`save`](Self::save) wrote: the inner optimizer with its hyper-parameters, the
    /// [`Clip`] with its history, and the counters. If the file is of an optimizer without a
    /// wrapper, the wrapper keeps its clip and counters. If the file has no [`LossScaler`], the
    /// wrapper keeps its own. [`last_report`](Self::last_report) is `None` afterwards. The weights
    /// must be loaded separately (see [`optim`](crate::optim#checkpoints)).
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_grad_clip::optim::Sgd;
    /// use candle_grad_clip::{Clip, ClippedOptimizer};
    /// use candle_nn::Optimizer;
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("candle-grad-clip-wrapper-{}", std::process::id()));
    /// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    /// let vars = vec![("w".to_string(), w.clone())];
    /// let make = |clip| ClippedOptimizer::wrap(Sgd::from_named_vars(vars.clone(), 0.1)?, vars.clone(), clip);
    /// let mut opt = make(Clip::norm(1.0))?;
    /// opt.backward_step(&w.sqr()?.sum_all()?)?;
    /// opt.save(&path)?;
    ///
    /// let mut resumed = make(Clip::none())?;
    /// resumed.load(&path)?;
    /// assert_eq!(resumed.clip(), &Clip::norm(1.0));
    /// resumed.set_clip(Clip::norm(0.5))?; // after `load`
    /// assert_eq!(resumed.backward_step_report(&w.sqr()?.sum_all()?)?.step(), 2);
    /// # let _ = std::fs::remove_file(path);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`optim::AdamW::load`]. Nothing is changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let mut parts = FusedParts::one(&mut self.inner);
        self.core.trained.adopt(&mut parts, &self.core.vars)?; // `inner_mut` may have replaced it
        let path = path.as_ref();
        let (steps_taken, skips) = (self.core.steps_taken()?, self.core.skips_in_a_row()?);
        let (vars, policy) = (&self.core.vars, &mut self.core.policy);
        let mut resumed = None;
        let mut check = |wrapper: &WrapperRecord| {
            let saved = (&wrapper.clip, &wrapper.rule, &wrapper.own_rule[..]);
            resumed = Some(policy.resumed(saved, vars, path)?);
            Ok(())
        };
        if let Some(wrapper) = load(path, &mut self.inner, &mut check)? {
            if let Some(resumed) = resumed {
                self.core.policy.resume(resumed);
            }
            self.core.step = wrapper.step;
            self.core.counters.steps_taken = wrapper.steps_taken;
            self.core.counters.skips.in_a_row = wrapper.skips_in_a_row;
            if let Some(scaling) = wrapper.loss_scaler {
                self.core.loss_scaler = Some(LossScaler(scaling));
            }
        } else {
            self.core.counters.steps_taken = steps_taken;
            self.core.counters.skips.in_a_row = skips;
        }
        self.core.forget_last_steps();
        Ok(())
    }
}
