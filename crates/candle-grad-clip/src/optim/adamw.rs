use std::fmt;
use std::path::Path;

use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_grad_clip_kernels as kernels;
use candle_nn::{Optimizer, ParamsAdamW};

use super::trained::Trained;
use super::{Fused, check_numbers};
use crate::check::{check_decay, check_not_negative};
use crate::checkpoint::{AdamWSettings, Loaded, Settings};
use crate::error::Result;
use crate::groups::{ParamGroup, ParamGroups, check_no_limits};
use crate::param_state::{Kept, StepRule};
use crate::vars::NamedVars;

/// AdamW that takes the clip into its update: a drop-in for [`candle_nn::AdamW`].
///
/// ```text
/// m <- beta1 m + (1 - beta1) g
/// v <- beta2 v + (1 - beta2) g^2
/// theta <- (1 - lr weight_decay) theta - lr m_hat / (sqrt(v_hat) + eps)
/// m_hat = m / (1 - beta1^step),  v_hat = v / (1 - beta2^step)
/// ```
///
/// `step` is a Var's own: the steps in which it had a gradient, as in PyTorch. So one that gets its first gradient late
/// begins as any other. (candle counts for all Vars at once: there its first step would be too long, up to 3.2 times the
/// learning rate with the default decays.) An `eps` below 1e-20, for f64 Vars 1e-150, counts as that: with 0 a zero
/// gradient would make NaN.
///
/// Where every Var has a gradient in each step, in f32 and f64, its weights are those of `candle_nn::AdamW`, to the bit (but
/// that a zero may have another sign). Vars of any shape, in f32, f64, f16 and bf16, mixed, on any devices; moments are f32, for f64 Vars f64
/// (candle's take the Var's dtype). A Var that comes twice is updated once.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_grad_clip::optim::AdamW; // instead of candle_nn::AdamW
/// use candle_grad_clip::{Clip, ClippedOptimizer, StepPath};
/// use candle_nn::{Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let model = candle_nn::linear(4, 1, vb)?;
/// let opt = AdamW::new(varmap.all_vars(), ParamsAdamW::default())?;
/// let mut opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?;
///
/// let x = Tensor::ones((8, 4), DType::F32, &Device::Cpu)?;
/// let loss = model.forward(&x)?.sqr()?.mean_all()?;
/// let report = opt.backward_step_report(&loss)?;
/// assert_eq!(report.path(), StepPath::Fused);
/// # Ok(())
/// # }
/// ```
///
/// # References
/// Loshchilov, Hutter (2019), "Decoupled weight decay regularization"; `torch.optim.AdamW` (PyTorch 2.15).
pub struct AdamW {
    trained: Trained,
    params: ParamsAdamW,
}

impl AdamW {
    /// An optimizer of Vars with names, which checkpoints and errors use: from `&VarMap`, `Vec<(String, Var)>` or
    /// `Vec<Var>` (see [`NamedVars`]). In a [`ClippedOptimizer`](crate::ClippedOptimizer) the wrapper's names are taken.
    ///
    /// ```
    /// use candle_grad_clip::optim::AdamW;
    /// use candle_nn::{Optimizer, ParamsAdamW, VarMap};
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let opt = AdamW::named(&VarMap::new(), ParamsAdamW::default())?;
    /// assert_eq!(opt.learning_rate(), 1e-3);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A hyper-parameter that is not finite or outside its range: `lr`, `eps`, `weight_decay` 0 or above, `beta1` and
    /// `beta2` in `[0, 1)`.
    pub fn named(vars: impl Into<NamedVars>, params: ParamsAdamW) -> Result<Self> {
        check(&params)?;
        Ok(Self {
            trained: Trained::new(vars.into(), Kept::adamw(false, false)),
            params,
        })
    }

    /// With the defaults of [`ParamsAdamW`] but for the learning rate.
    ///
    /// # Errors
    /// As [`AdamW::named`].
    pub fn new_lr(vars: Vec<Var>, learning_rate: f64) -> candle_core::Result<Self> {
        let params = ParamsAdamW {
            lr: learning_rate,
            ..ParamsAdamW::default()
        };
        Self::new(vars, params)
    }

    /// Whether the largest second moment so far is used (`AMSGrad`), which takes one more array. Default: no.
    ///
    /// Training starts anew: moments and step counter are forgotten.
    ///
    /// # References
    /// Reddi, Kale, Kumar (2018), "On the convergence of Adam and beyond"; `amsgrad` of `torch.optim.AdamW`.
    #[must_use]
    pub fn amsgrad(mut self, amsgrad: bool) -> Self {
        let master_weights = self.trained.kept().master_weights;
        self.trained.restart(Kept::adamw(amsgrad, master_weights));
        self
    }

    /// Whether f16 and bf16 Vars have an f32 copy that takes the updates (see [the module](super)). Default: no.
    ///
    /// The copy is made in a Var's first step. Where a Var is set from outside after that (`Var::set`, `VarMap::load`), so that
    /// the copy no longer rounds to it, the copy is made anew in the next step. Training starts anew: moments and step counter are forgotten.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use candle_grad_clip::optim::AdamW;
    /// use candle_nn::Optimizer;
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let w = Var::ones(1, DType::BF16, &Device::Cpu)?;
    /// let mut opt = AdamW::new_lr(vec![w.clone()], 1e-3)?.master_weights(true);
    /// for _ in 0..8 {
    ///     opt.backward_step(&w.to_dtype(DType::F32)?.sum_all()?)?; // 0.001 less, 8 times
    /// }
    /// assert_eq!(w.to_dtype(DType::F32)?.to_vec1::<f32>()?, [0.9921875]); // without it: 1
    /// # Ok(())
    /// # }
    /// ```
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
    /// use candle_grad_clip::optim::{AdamW, ParamGroup, ParamGroups};
    /// use candle_nn::Optimizer;
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let w = Var::new(&[1f64], &Device::Cpu)?;
    /// let groups = ParamGroups::new(vec![ParamGroup::new("frozen", &["emb*"]).lr_scale(0.0)])?;
    /// let mut opt = AdamW::named(vec![("embed".to_string(), w.clone())], candle_nn::ParamsAdamW::default())?.groups(groups)?;
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
    pub fn params(&self) -> &ParamsAdamW {
        &self.params
    }

    /// Takes other hyper-parameters, from the next step on, which checks them.
    pub fn set_params(&mut self, params: ParamsAdamW) {
        self.params = params;
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
    /// use candle_grad_clip::optim::AdamW;
    /// use candle_nn::{Optimizer, ParamsAdamW};
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("candle-grad-clip-adamw-{}", std::process::id()));
    /// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    /// let vars = vec![("w".to_string(), w.clone())];
    /// let mut opt = AdamW::named(vars.clone(), ParamsAdamW::default())?;
    /// opt.backward_step(&w.sqr()?.sum_all()?)?;
    /// opt.save(&path)?;
    ///
    /// let mut resumed = AdamW::named(vars, ParamsAdamW { lr: 0.5, ..Default::default() })?;
    /// resumed.load(&path)?;
    /// assert_eq!((resumed.steps(), resumed.learning_rate()), (1, 1e-3));
    /// resumed.set_learning_rate(1e-4); // after `load`
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

pub(crate) fn check(params: &ParamsAdamW) -> Result<()> {
    check_not_negative("lr", params.lr)?;
    check_decay("beta1", params.beta1)?;
    check_decay("beta2", params.beta2)?;
    check_not_negative("eps", params.eps)?;
    check_not_negative("weight_decay", params.weight_decay)
}

impl Fused for AdamW {
    fn next_rule(&self, group: Option<&ParamGroup>) -> Result<StepRule> {
        check(&self.params)?;
        let ParamsAdamW {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
        } = self.params;
        let lr = lr * group.map_or(1.0, ParamGroup::learning_rate_scale);
        let weight_decay = group.map_or(weight_decay, |group| group.weight_decay_or(weight_decay));
        check_numbers(
            &self.trained,
            &[
                ("lr", lr),
                ("eps", eps),
                ("lr times weight_decay", lr * weight_decay),
            ],
        )?;
        let step = self.trained.next_step(); // a Var's own takes its place
        Ok(StepRule::AdamW(kernels::AdamW {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            step,
        }))
    }

    fn trained(&self) -> &Trained {
        &self.trained
    }

    fn trained_mut(&mut self) -> &mut Trained {
        &mut self.trained
    }

    fn settings(&self) -> Settings {
        let kept = self.trained.kept();
        Settings::AdamW(AdamWSettings {
            params: self.params.clone(),
            amsgrad: kept.moments == 3,
            master_weights: kept.master_weights,
        })
    }

    fn restore(&mut self, loaded: Loaded) {
        let kept = loaded.settings.kept();
        if let Settings::AdamW(settings) = loaded.settings {
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

impl Optimizer for AdamW {
    type Config = ParamsAdamW;

    fn new(vars: Vec<Var>, params: ParamsAdamW) -> candle_core::Result<Self> {
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
impl fmt::Debug for AdamW {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = self.trained.kept();
        f.debug_struct("AdamW")
            .field("params", &self.params)
            .field("amsgrad", &(kept.moments == 3))
            .field("master_weights", &kept.master_weights)
            .field("vars", &self.trained.vars().vars().len())
            .field("steps", &self.trained.steps())
            .finish_non_exhaustive()
    }
}
