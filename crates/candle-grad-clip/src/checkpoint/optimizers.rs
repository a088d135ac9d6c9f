//! `save` and `load` of the optimizers without a wrapper.

use std::path::Path;

use super::atomic_write::replace;
use super::header::Parts;
use super::load::read;
use super::save::{Contents, save};
use crate::error::Result;
use crate::optim::{AdamW, Fused, Sgd};

fn save_alone(path: &Path, optimizer: &dyn Fused, non_finite: bool) -> Result<()> {
    let contents = Contents {
        parts: Parts::one(optimizer.trained(), optimizer.settings()),
        wrapper: None,
        non_finite,
    };
    save(path, contents, |path, write| replace(path, write))
}

/// The methods of an optimizer, with an example of `load`.
macro_rules! save_and_load {
    ($Optimizer:ident, $(#[$load_example:meta])* load) => {
        impl $Optimizer {
            /// Saves the optimizer's state and hyper-parameters, not the weights (see [the
            /// module](crate::optim#checkpoints)).
            ///
            /// # Errors
            /// [`Error::CheckpointIo`](crate::Error::CheckpointIo), two Vars with the same name,
            /// hyper-parameters outside their range (they could not be loaded), or NaN or infinite
            /// state. An existing file then stays intact. Only after
            /// [`Error::CheckpointNotDurable`](crate::Error::CheckpointNotDurable) the new file is
            /// in place.
            pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
                save_alone(path.as_ref(), self, false)
            }

            /// Like [`save`](Self::save), but also saves NaN or infinite state. `save` refuses
            /// this, so that it does not replace a good file. `load` accepts such a file.
            ///
            /// # Errors
            /// As [`save`](Self::save).
            pub fn save_non_finite(&self, path: impl AsRef<Path>) -> Result<()> {
                save_alone(path.as_ref(), self, true)
            }

            /// Restores the state and the hyper-parameters that [`save`](Self::save) wrote, here or
            /// in a [`ClippedOptimizer`](crate::ClippedOptimizer). The wrapper's own state is
            /// ignored. The weights must be loaded separately (see [the
            /// module](crate::optim#checkpoints)).
            ///
            $(#[$load_example])*
            ///
            /// # Errors
            /// [`Error::CheckpointIo`](crate::Error::CheckpointIo), a file that is damaged or not a
            /// checkpoint, or [`Error::CheckpointMismatch`](crate::Error::CheckpointMismatch) with
            /// all differences. Nothing is changed then.
            pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
                let parts = Parts::one(self.trained(), self.settings());
                let (loaded, _) = read(path.as_ref(), &parts)?;
                for loaded in loaded {
                    self.restore(loaded);
                }
                Ok(())
            }
        }
    };
}

save_and_load! {
    AdamW,
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_grad_clip::optim::AdamW;
    /// use candle_nn::{Optimizer, ParamsAdamW};
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("candle-grad-clip-adamw-{}", std::process::id()));
    /// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    /// let vars = vec![("w".to_string(), w.clone())];
    /// let mut opt = AdamW::from_named_vars(vars.clone(), ParamsAdamW::default())?;
    /// opt.backward_step(&w.sqr()?.sum_all()?)?;
    /// opt.save(&path)?;
    ///
    /// let mut resumed = AdamW::from_named_vars(vars, ParamsAdamW { lr: 0.5, ..Default::default() })?;
    /// resumed.load(&path)?;
    /// assert_eq!((resumed.steps(), resumed.learning_rate()), (1, 1e-3));
    /// resumed.set_learning_rate(1e-4); // after `load`
    /// # let _ = std::fs::remove_file(path);
    /// # Ok(())
    /// # }
    /// ```
    load
}

save_and_load! {
    Sgd,
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_grad_clip::optim::{ParamsSgd, Sgd};
    /// use candle_nn::Optimizer;
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("candle-grad-clip-sgd-{}", std::process::id()));
    /// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    /// let vars = vec![("w".to_string(), w.clone())];
    /// let params = ParamsSgd { lr: 0.1, momentum: 0.9, ..Default::default() };
    /// let mut opt = Sgd::from_named_vars(vars.clone(), params)?;
    /// opt.backward_step(&w.sqr()?.sum_all()?)?;
    /// opt.save(&path)?;
    ///
    /// let mut resumed = Sgd::from_named_vars(vars, 0.5)?;
    /// resumed.load(&path)?;
    /// assert_eq!((resumed.steps(), resumed.params()), (1, &params));
    /// # let _ = std::fs::remove_file(path);
    /// # Ok(())
    /// # }
    /// ```
    load
}
