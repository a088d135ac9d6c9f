//! `save` and `load` of an optimizer in a [`ClippedOptimizer`].

use std::any::type_name;
use std::path::Path;

use candle_nn::Optimizer;

use super::atomic_write::replace;
use super::header::{Part, Parts, WrapperRecord, describe_groups};
use super::load::read;
use super::save::{Contents, MakeFile, save};
#[cfg(doc)]
use crate::clip::Clip;
use crate::clip::Resumed;
use crate::error::Result;
use crate::loss_scaler::LossScaler;
use crate::optim::{self, Fused, Loaded, OtherSettings, ParamStates, Settings};
use crate::optimizer::ClippedOptimizer;
use crate::param_state::StateLayout;

/// Checkpoints, for the optimizers that support them.
impl<O: optim::Checkpoint> ClippedOptimizer<O> {
    /// Saves the inner optimizer like its own `save`. The file also has the [`Clip`] with its
    /// history, the counters (steps, taken steps, skips in a row) and the [`LossScaler`]. It does
    /// not have the weights (see [`optim`](crate::optim#checkpoints), or
    /// [`Checkpoints`](crate::Checkpoints), which saves both).
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
        self.write(path, non_finite, |path, write| replace(path, write))
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
        let staged = self.stage(path.as_ref())?;
        self.install(staged);
        Ok(())
    }
}

/// What a file holds for a wrapper: read and checked, but not installed.
pub(super) struct Staged {
    /// Of each optimizer.
    loaded: Vec<Loaded>,
    wrapper: Option<(WrapperRecord, Resumed)>,
    /// Steps taken and skips in a row so far, which a file without a wrapper leaves as they are.
    counted: (u64, u32),
}

/// For any optimizer. Of one that is not fused, a file has only the learning rate.
impl<O: Optimizer + 'static> ClippedOptimizer<O> {
    /// Writes a file, which `make_file` makes.
    pub(super) fn write(&self, path: &Path, non_finite: bool, make_file: MakeFile) -> Result<()> {
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
        let fused = optim::fused_ref(&self.inner);
        let stateless = self.without_state()?;
        let contents = Contents {
            parts: self.parts(&fused, &stateless),
            wrapper: Some((&core.vars, wrapper)),
            non_finite,
        };
        save(path, contents, make_file)
    }

    /// Reads a file, and checks that it fits. Changes nothing, but a user-defined rule has loaded
    /// its state then.
    pub(super) fn stage(&mut self, path: &Path) -> Result<Staged> {
        if let Some(mut parts) = optim::fused(&mut self.inner) {
            self.core.trained.adopt(&mut parts, &self.core.vars)?; // `inner_mut` may have replaced it
        }
        let fused = optim::fused_ref(&self.inner);
        let stateless = self.without_state()?;
        let (loaded, wrapper) = read(path, &self.parts(&fused, &stateless))?;
        let core = &mut self.core;
        let counted = (core.steps_taken()?, core.skips_in_a_row()?);
        let wrapper = match wrapper {
            None => None,
            Some(wrapper) => {
                let saved = (&wrapper.clip, &wrapper.rule, &wrapper.own_rule[..]);
                let resumed = core.policy.resumed(saved, &core.vars, path)?;
                Some((wrapper, resumed))
            }
        };
        Ok(Staged {
            loaded,
            wrapper,
            counted,
        })
    }

    /// Installs what was read, which can't fail.
    pub(super) fn install(&mut self, staged: Staged) {
        if let [
            Loaded {
                settings: Settings::Other(other),
                ..
            },
        ] = &staged.loaded[..]
        {
            self.inner.set_learning_rate(other.lr);
        } else if let Some(mut parts) = optim::fused(&mut self.inner) {
            parts.restore(staged.loaded);
        }
        let core = &mut self.core;
        (core.counters.steps_taken, core.counters.skips.in_a_row) = staged.counted;
        if let Some((wrapper, resumed)) = staged.wrapper {
            core.policy.resume(resumed);
            core.step = wrapper.step;
            core.counters.steps_taken = wrapper.steps_taken;
            core.counters.skips.in_a_row = wrapper.skips_in_a_row;
            if let Some(scaling) = wrapper.loss_scaler {
                core.loss_scaler = Some(LossScaler(scaling));
            }
        }
        core.forget_last_steps();
    }

    /// What a file has of the inner optimizer: the parts that are fused, or its learning rate.
    fn parts<'a>(&self, fused: &[&'a dyn Fused], stateless: &'a ParamStates) -> Parts<'a> {
        let part = |fused: &&'a dyn Fused| Part::new(fused.trained(), fused.settings());
        let mut parts = match fused {
            [] => return Parts::one(stateless, self.other_settings()),
            [first, others @ ..] => Parts {
                first: part(first),
                second: others.first().map(part),
            },
        };
        if parts.second.is_some() {
            // The limits of a pair's groups belong to the wrapper.
            let limits = describe_groups(self.core.policy.limits().groups());
            parts.first.groups.extend(limits);
        }
        parts
    }

    /// The Vars of an optimizer whose state is not known.
    fn without_state(&self) -> Result<ParamStates> {
        let mut trained = ParamStates::new(self.core.vars.clone(), StateLayout::default());
        trained.set_groups(self.core.policy.limits().groups().clone())?;
        Ok(trained)
    }

    fn other_settings(&self) -> Settings {
        Settings::Other(OtherSettings {
            name: type_name::<O>().to_string(),
            lr: self.inner.learning_rate(),
        })
    }
}
