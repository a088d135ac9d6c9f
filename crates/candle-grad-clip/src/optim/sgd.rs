use std::fmt;
use std::path::Path;

use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_grad_clip_kernels as kernels;
use candle_nn::Optimizer;

use super::trained::Trained;
use super::{Fused, check_numbers};
use crate::check::check_not_negative;
use crate::checkpoint::{Loaded, Settings, SgdSettings};
use crate::error::{Error, Result};
use crate::groups::{ParamGroup, ParamGroups, check_no_limits};
use crate::param_state::{Kept, StepRule};
use crate::vars::NamedVars;

/// Hyper-parameters of [`Sgd`], named and meant as those of `torch.optim.SGD`.
///
/// ```
/// use candle_grad_clip::optim::ParamsSgd;
///
/// assert_eq!(ParamsSgd::from(0.1), ParamsSgd { lr: 0.1, ..Default::default() });
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParamsSgd {
    /// Learning rate. Default: 1e-3, as in PyTorch.
    pub lr: f64,
    /// What is kept of the momentum buffer in each step. Default: 0, no momentum and no buffer.
    pub momentum: f64,
    /// What is held back of the gradient before it goes into the buffer, 0 to 1 (PyTorch takes any number). Default: 0.
    pub dampening: f64,
    /// Weight decay, added to the (clipped) gradient. Default: 0.
    pub weight_decay: f64,
    /// Nesterov momentum; needs a momentum, and no dampening. Default: no.
    pub nesterov: bool,
}

impl Default for ParamsSgd {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            momentum: 0.0,
            dampening: 0.0,
            weight_decay: 0.0,
            nesterov: false,
        }
    }
}

/// A learning rate alone: plain gradient descent, as candle's config is.
impl From<f64> for ParamsSgd {
    fn from(lr: f64) -> Self {
        Self {
            lr,
            ..Self::default()
        }
    }
}

/// Stochastic gradient descent, with momentum as in PyTorch, that takes the clip into its update.
///
/// ```text
/// g <- g + weight_decay theta
/// b <- momentum b + (1 - dampening) g      (b <- g in a Var's first step, the first with a gradient)
/// d = g + momentum b if nesterov, else b   (d = g without momentum)
/// theta <- theta - lr d
/// ```
///
/// Without momentum and weight decay its weights are those of [`candle_nn::SGD`], to the bit. Vars of any shape, in
/// f32, f64, f16 and bf16, mixed, on any devices; the buffer is f32, for f64 Vars f64. A Var that comes twice is updated
/// once.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::optim::{ParamsSgd, Sgd};
/// use candle_grad_clip::{Clip, ClippedOptimizer};
/// use candle_nn::Optimizer;
///
/// # fn main() -> candle_core::Result<()> {
/// let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
/// let params = ParamsSgd { lr: 0.5, momentum: 0.9, ..Default::default() };
/// let opt = Sgd::new(vec![w.clone()], params)?;
/// let mut opt = ClippedOptimizer::wrap(opt, vec![w.clone()], Clip::value(1.0))?;
/// opt.backward_step(&w.sqr()?.sum_all()?)?;
/// assert_eq!(w.to_vec1::<f64>()?, [2.5, 3.5]);
/// # Ok(())
/// # }
/// ```
///
/// # References
/// `torch.optim.SGD` (PyTorch 2.15).
pub struct Sgd {
    trained: Trained,
    params: ParamsSgd,
}

impl Sgd {
    /// An optimizer of Vars with names, which checkpoints and errors use: from `&VarMap`, `Vec<(String, Var)>` or
    /// `Vec<Var>` (see [`NamedVars`]). In a [`ClippedOptimizer`](crate::ClippedOptimizer) the wrapper's names are taken.
    ///
    /// ```
    /// use candle_grad_clip::optim::Sgd;
    /// use candle_nn::VarMap;
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let opt = Sgd::named(&VarMap::new(), 0.1)?;
    /// assert_eq!(opt.params().momentum, 0.0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A hyper-parameter that is not finite or below 0; a dampening above 1; Nesterov momentum without momentum or
    /// with dampening. Steps check what they compute with: numbers that are infinite in f32 too, unless all Vars are f64.
    pub fn named(vars: impl Into<NamedVars>, params: impl Into<ParamsSgd>) -> Result<Self> {
        let params = params.into();
        check(&params)?;
        let kept = Kept::sgd(params.momentum, false);
        Ok(Self {
            trained: Trained::new(vars.into(), kept),
            params,
        })
    }

    /// Plain gradient descent.
    ///
    /// # Errors
    /// A learning rate that is not finite or below 0.
    pub fn new_lr(vars: Vec<Var>, learning_rate: f64) -> candle_core::Result<Self> {
        Self::new(vars, learning_rate.into())
    }

    /// Whether f16 and bf16 Vars have an f32 copy that takes the updates (see [the module](super)). Default: no.
    ///
    /// The copy is made in a Var's first step. Where a Var is set from outside after that (`Var::set`, `VarMap::load`), so that
    /// the copy no longer rounds to it, the copy is made anew in the next step. Training starts anew: momentum is forgotten.
    #[must_use]
    pub fn master_weights(mut self, master_weights: bool) -> Self {
        self.trained.restart(Kept {
            master_weights,
            ..self.trained.kept()
        });
        self
    }

    /// Other learning rates and weight decays for some Vars, by name: for an optimizer by itself. One in a
    /// [`ClippedOptimizer`](crate::ClippedOptimizer) gets its groups from there.
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_grad_clip::optim::{Sgd, ParamGroup, ParamGroups};
    /// use candle_nn::Optimizer;
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let w = Var::new(&[1f64], &Device::Cpu)?;
    /// let groups = ParamGroups::new(vec![ParamGroup::new("frozen", &["emb*"]).lr_scale(0.0)])?;
    /// let mut opt = Sgd::named(vec![("embed".to_string(), w.clone())], 0.1)?.groups(groups)?;
    /// opt.backward_step(&w.sum_all()?)?;
    /// assert_eq!(w.to_vec1::<f64>()?, [1.0]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A pattern that matches no Var; a group with a limit, as nothing is clipped here.
    pub fn groups(mut self, groups: ParamGroups) -> Result<Self> {
        check_no_limits(&groups)?;
        self.trained.set_groups(groups)?;
        Ok(self)
    }

    /// The hyper-parameters.
    #[must_use]
    pub fn params(&self) -> &ParamsSgd {
        &self.params
    }

    /// Takes other hyper-parameters, from the next step on.
    ///
    /// # Errors
    /// As [`Sgd::named`]; a momentum of 0 after another one, or the other way round, as that decides what is kept. The
    /// old ones stay then.
    pub fn set_params(&mut self, params: impl Into<ParamsSgd>) -> Result<()> {
        let params = params.into();
        check(&params)?;
        if (params.momentum == 0.0) != (self.params.momentum == 0.0) {
            return Err(Error::InvalidOption {
                name: "momentum",
                value: params.momentum,
                expected: "0 if it was 0, and not if it was not: make a new optimizer for that",
            });
        }
        self.params = params;
        Ok(())
    }

    /// The Vars, with their names.
    #[must_use]
    pub fn vars(&self) -> &NamedVars {
        self.trained.vars()
    }

    /// Steps taken; a skipped step is none. Waits for a GPU that decides which are.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.trained.steps()
    }

    /// Saves the optimizer's state and hyper-parameters, not the weights (see [the module](super#checkpoints)).
    ///
    /// # Errors
    /// [`Error::CheckpointIo`](crate::Error::CheckpointIo); two Vars of one name; hyper-parameters outside their range, as those
    /// could not be loaded; state that is NaN or infinite. A file that was there stays then, whole. After
    /// [`Error::CheckpointNotDurable`](crate::Error::CheckpointNotDurable) alone the new file is in its place.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_to(path.as_ref(), None, false)
    }

    /// As [`save`](Self::save), also where the state is NaN or infinite, which `save` refuses to write over a good file. `load` takes
    /// such a file as it is.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_non_finite(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_to(path.as_ref(), None, true)
    }

    /// Goes on from what [`save`](Self::save) wrote, here or in a [`ClippedOptimizer`](crate::ClippedOptimizer), whose own state is
    /// then left out. Hyper-parameters become those of the file. The weights must be loaded as well (see
    /// [the module](super#checkpoints)).
    ///
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
    /// let mut opt = Sgd::named(vars.clone(), params)?;
    /// opt.backward_step(&w.sqr()?.sum_all()?)?;
    /// opt.save(&path)?;
    ///
    /// let mut resumed = Sgd::named(vars, 0.5)?;
    /// resumed.load(&path)?;
    /// assert_eq!((resumed.steps(), resumed.params()), (1, &params));
    /// # let _ = std::fs::remove_file(path);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::CheckpointIo`](crate::Error::CheckpointIo); a file that is no checkpoint, or a damaged one;
    /// [`Error::CheckpointMismatch`](crate::Error::CheckpointMismatch) with all that differs. Nothing is changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.load_from(path.as_ref(), &mut |_| Ok(()))?;
        Ok(())
    }
}

pub(crate) fn check(params: &ParamsSgd) -> Result<()> {
    check_not_negative("lr", params.lr)?;
    check_not_negative("momentum", params.momentum)?;
    check_not_negative("weight_decay", params.weight_decay)?;
    if !(0.0..=1.0).contains(&params.dampening) {
        return Err(Error::InvalidOption {
            name: "dampening",
            value: params.dampening,
            expected: "0 to 1: with more, momentum would climb",
        });
    }
    if params.nesterov && params.momentum == 0.0 {
        return Err(Error::InvalidOption {
            name: "momentum",
            value: params.momentum,
            expected: "a value above 0 for Nesterov momentum",
        });
    }
    if params.nesterov && params.dampening != 0.0 {
        return Err(Error::InvalidOption {
            name: "dampening",
            value: params.dampening,
            expected: "0 for Nesterov momentum",
        });
    }
    Ok(())
}

impl Fused for Sgd {
    fn next_rule(&self, group: Option<&ParamGroup>) -> Result<StepRule> {
        check(&self.params)?;
        let ParamsSgd {
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
        } = self.params;
        let lr = lr * group.map_or(1.0, ParamGroup::learning_rate_scale);
        let weight_decay = group.map_or(weight_decay, |group| group.weight_decay_or(weight_decay));
        check_numbers(
            &self.trained,
            &[
                ("lr", lr),
                ("momentum", momentum),
                ("weight_decay", weight_decay),
            ],
        )?;
        Ok(StepRule::Sgd(kernels::Sgd {
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            is_first: false,
        }))
    }

    fn trained(&self) -> &Trained {
        &self.trained
    }

    fn trained_mut(&mut self) -> &mut Trained {
        &mut self.trained
    }

    fn settings(&self) -> Settings {
        Settings::Sgd(SgdSettings {
            params: self.params,
            master_weights: self.trained.kept().master_weights,
        })
    }

    fn restore(&mut self, loaded: Loaded) {
        let kept = loaded.settings.kept();
        if let Settings::Sgd(settings) = loaded.settings {
            self.params = settings.params;
            let Loaded {
                states,
                steps,
                counts,
                ..
            } = loaded;
            self.trained.restore(kept, states, steps, counts);
        }
    }
}

impl Optimizer for Sgd {
    type Config = ParamsSgd;

    fn new(vars: Vec<Var>, params: ParamsSgd) -> candle_core::Result<Self> {
        Ok(Self::named(vars, params)?)
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        Ok(self.fused_step(grads, None)?)
    }

    fn learning_rate(&self) -> f64 {
        self.params.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.params.lr = lr;
    }
}

/// Shows no state: it is as large as the model.
impl fmt::Debug for Sgd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sgd")
            .field("params", &self.params)
            .field("master_weights", &self.trained.kept().master_weights)
            .field("vars", &self.trained.vars().vars().len())
            .field("steps", &self.trained.steps())
            .finish_non_exhaustive()
    }
}
