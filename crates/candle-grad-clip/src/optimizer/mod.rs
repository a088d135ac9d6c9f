//! The wrapper: a thin generic layer over [`Core`], which is compiled once.

mod core;
mod counters;
mod inner;
mod missing;
mod nested;
mod on_device;
mod overflow;
mod pending;
mod record;
mod report;
mod settings;
mod skips;
mod step;
mod tiny_coefs;
mod trained_vars;

use std::any::type_name;
use std::fmt;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::Optimizer;

pub(crate) use self::core::Core;
use crate::clip::Clip;
use crate::error::Result;
use crate::vars::NamedVars;
use inner::Inner;
pub use record::{StepPath, StepRecord};
pub use report::StepReport;
use step::Grads;

/// An optimizer's config with a [`Clip`]: the config of [`ClippedOptimizer`], for code that makes
/// its optimizer from Vars and a config.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::{Clip, ClippedConfig, ClippedOptimizer};
/// use candle_nn::{Optimizer, SGD};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = vec![Var::new(&[3f32, 4.0], &Device::Cpu)?];
/// let config = ClippedConfig { inner: 0.1, clip: Clip::norm(1.0) };
/// let opt = ClippedOptimizer::<SGD>::new(vars, config)?;
/// assert_eq!(opt.learning_rate(), 0.1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct ClippedConfig<C> {
    /// The inner optimizer's config.
    pub inner: C,
    /// The clip for the gradients.
    pub clip: Clip,
}

/// Adds gradient clipping to any candle optimizer.
///
/// A step takes the `GradStore` of `backward()`, measures the gradients of the optimizer's Vars,
/// decides by its [`Clip`], edits the gradients, and calls the inner optimizer:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_grad_clip::{Clip, ClippedOptimizer};
/// use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let model = candle_nn::linear(4, 1, vb.pp("head"))?;
///
/// let opt = AdamW::new(varmap.all_vars(), ParamsAdamW::default())?;
/// let mut opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?; // the one line
///
/// let x = Tensor::ones((8, 4), DType::F32, &Device::Cpu)?;
/// let loss = model.forward(&x)?.sqr()?.mean_all()?;
/// opt.backward_step(&loss)?;
///
/// let report = opt.last_report().unwrap();
/// println!("norm {} -> {}", report.total_norm()?, report.record()?.clipped_norm);
/// assert!(report.missing_grads().is_empty());
/// # Ok(())
/// # }
/// ```
///
/// # In place or copied
/// `backward_step` owns the gradients and edits them in place. `step(&GradStore)` never changes the
/// caller's gradients: the inner optimizer gets edited copies, in a buffer that the next step
/// reuses. So an inner optimizer must not keep the gradient *tensors* of `step`: the next `step`
/// overwrites them. It may keep those of `backward_step`.
///
/// # Which Vars are clipped
/// The wrapper's Vars, if they have a gradient. The wrapper knows which Vars a fused optimizer
/// ([`optim`](crate::optim)) trains. A trained Var that is missing from the wrapper is an error,
/// unless it is [allowed](Self::wrap_allow_unclipped). A Var that the optimizer does not train is
/// ignored.
///
/// For other optimizers, pass exactly the Vars that they train. The gradients of a frozen layer
/// would count in the global norm; exclude its group with
/// [`no_clip`](crate::optim::ParamGroup::no_clip). Gradients of other tensors in the store stay
/// unclipped, and only the scale of a [`LossScaler`](crate::LossScaler) is removed from them.
/// `backward_step` warns once about Vars in the loss's graph that the wrapper was not given.
/// `step(&GradStore)` can't: a store does not distinguish Vars from constants.
///
/// # Nesting
/// A wrapper may be the inner optimizer of another one. The outer one clips first, and its report
/// is `skipped` if the inner one skipped. Only the outermost may have a
/// [`LossScaler`](crate::LossScaler).
///
/// # Failure
/// All checks come before the first write. A step that is skipped or returns an error changes no
/// weight and no state of the inner optimizer, unless the inner `step` itself fails halfway.
///
/// [`NonFinite`](crate::NonFinite) covers gradients, not updates. Without a limit ([`Clip::none`],
/// an infinite limit, the first step of [`Clip::quantile`]), finite gradients near the dtype's
/// maximum can make weights NaN or infinite.
///
/// A coefficient below 1e-6 in ten steps in a row causes one warning, under any rule: see
/// [`StepRecord::tiny_coefs_in_a_row`](crate::StepRecord::tiny_coefs_in_a_row).
pub struct ClippedOptimizer<O: Optimizer> {
    pub(crate) inner: O,
    pub(crate) core: Core,
}

impl<O: Optimizer + 'static> ClippedOptimizer<O> {
    /// Wraps `inner` with `clip`. `vars` are the Vars that `inner` trains, with their names:
    /// `&VarMap`, `Vec<(String, Var)>` or `Vec<Var>` (see [`NamedVars`]).
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let opt = ClippedOptimizer::wrap(sgd, vec![("head".to_string(), w)], Clip::norm(1.0))?;
    /// assert_eq!(opt.vars().names(), ["head"]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// A field of `clip` outside its range. For [`Clip::agc`], a pattern that matches no Var, or a
    /// Var with an unsupported rank. An f64 Var on Metal. Two Vars with one name. A fused `inner`
    /// that trains a Var outside `vars`.
    pub fn wrap(inner: O, vars: impl Into<NamedVars>, clip: Clip) -> Result<Self> {
        Self::wrap_allow_unclipped(inner, vars, clip, &[])
    }

    /// As [`wrap`](Self::wrap), but `inner`, a fused optimizer, may also train Vars that are not in
    /// `vars` if their names match one of the patterns (`*` stands for any characters).
    ///
    /// These Vars are neither measured nor clipped, and no policy applies: non-finite elements
    /// reach their weights. The scale of a [`LossScaler`](crate::LossScaler) is removed. A group
    /// with [`no_clip`](crate::optim::ParamGroup::no_clip) is not clipped either, but the policy
    /// applies to it.
    ///
    /// Around any other optimizer, the pattern `*` turns off the warning of `backward_step` about
    /// Vars that the wrapper was not given. Use it where another optimizer trains them, as in a GAN.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer, Error, optim::Sgd};
    /// # use candle_nn::Optimizer;
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let embed = ("embed".to_string(), Var::new(&[3f64, 4.0], &Device::Cpu)?);
    /// let head = ("head".to_string(), Var::new(&[3f64, 4.0], &Device::Cpu)?);
    /// let sgd = || Sgd::from_named_vars(vec![embed.clone(), head.clone()], 0.1);
    /// let error = ClippedOptimizer::wrap(sgd()?, vec![head.clone()], Clip::norm(1.0)).unwrap_err();
    /// assert!(matches!(error, Error::UnclippedVars { vars } if vars == ["embed"]));
    ///
    /// let head = vec![head.clone()];
    /// let mut opt = ClippedOptimizer::wrap_allow_unclipped(sgd()?, head, Clip::norm(1.0), &["embed"])?;
    /// let loss = (embed.1.sqr()?.sum_all()? / 2.0)?;
    /// opt.backward_step(&loss)?;
    /// assert_eq!(embed.1.to_vec1::<f64>()?, [2.7, 3.6]); // a step of 0.1 along (3, 4)
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`wrap`](Self::wrap).
    pub fn wrap_allow_unclipped(
        mut inner: O,
        vars: impl Into<NamedVars>,
        clip: Clip,
        allow_unclipped: &[&str],
    ) -> Result<Self> {
        let core = Core::new(
            Inner::of(&mut inner),
            type_name::<O>(),
            vars.into(),
            clip,
            allow_unclipped,
        )?;
        Ok(Self { inner, core })
    }

    /// Takes a step like [`Optimizer::step`], but returns a report or this crate's typed error.
    ///
    /// The caller's gradients don't change: edited copies go to a buffer that the next step
    /// overwrites. An inner optimizer must not keep these tensors.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer};
    /// # use candle_nn::{Optimizer, SGD};
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
    /// # let sgd = SGD::new(vec![w.clone()], 0.1)?;
    /// let mut opt = ClippedOptimizer::wrap(sgd, vec![w.clone()], Clip::norm(1.0))?;
    /// let grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?;
    /// let report = opt.step_report(&grads)?;
    /// assert_eq!(report.total_norm()?, 5.0);
    /// assert_eq!(grads.get(&w).unwrap().to_vec1::<f64>()?, [3.0, 4.0]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Non-finite elements under [`NonFinite::Error`](crate::NonFinite::Error). Too many skipped
    /// steps in a row. A gradient whose shape, dtype or device differs from its Var's, or with an
    /// integer or 8-bit dtype. A store without any of the Vars' gradients. An invalid learning rate or
    /// scheduled limit. A [`ClipRule`](crate::ClipRule) with an invalid decision. Misuse of a
    /// [`LossScaler`](crate::LossScaler). An error of the inner optimizer; all others change nothing.
    pub fn step_report(&mut self, grads: &GradStore) -> Result<StepReport> {
        self.step_lent(grads, None)
    }

    /// As [`step_report`](Self::step_report), with the loss for a rule that uses it
    /// ([`SkipSteps::loss_z`](crate::SkipSteps::loss_z)). Pass the loss before the scale of a
    /// [`LossScaler`](crate::LossScaler).
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer};
    /// # use candle_nn::{Optimizer, SGD};
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
    /// # let sgd = SGD::new(vec![w.clone()], 0.1)?;
    /// let mut opt = ClippedOptimizer::wrap(sgd, vec![w.clone()], "skip:loss_z=6,window=4".parse()?)?;
    /// let grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?;
    /// for loss in [1.0, 1.1] {
    ///     assert!(!opt.step_report_with_loss(&grads, loss)?.skipped()?);
    /// }
    /// assert!(opt.step_report_with_loss(&grads, 9.0)?.skipped()?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`step_report`](Self::step_report).
    pub fn step_report_with_loss(&mut self, grads: &GradStore, loss: f64) -> Result<StepReport> {
        self.step_lent(grads, Some(loss))
    }

    fn step_lent(&mut self, grads: &GradStore, loss: Option<f64>) -> Result<StepReport> {
        let mut inner = Inner::of(&mut self.inner);
        self.core.check_before_step(&inner)?;
        self.core.step(&mut inner, Grads::Lent(grads), loss)
    }

    /// Calls `backward` and takes a step like [`Optimizer::backward_step`], but returns a report or
    /// this crate's typed error.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer};
    /// # use candle_nn::{Optimizer, SGD};
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
    /// # let sgd = SGD::new(vec![w.clone()], 0.1)?;
    /// let mut opt = ClippedOptimizer::wrap(sgd, vec![w.clone()], Clip::value(1.0))?;
    /// let report = opt.backward_step_report(&(w.sqr()?.sum_all()? / 2.0)?)?;
    /// assert_eq!((report.step(), report.record()?.num_clipped), (1, 2));
    /// assert_eq!(w.to_vec1::<f64>()?, [2.9, 3.9]); // a step of 0.1 along (1, 1)
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ClippedOptimizer::step_report`], and those of `backward`. A loss that is not a scalar,
    /// for a rule that uses it.
    pub fn backward_step_report(&mut self, loss: &Tensor) -> Result<StepReport> {
        let mut inner = Inner::of(&mut self.inner);
        self.core.check_before_step(&inner)?;
        let value = self.core.loss_value(loss)?;
        let loss = self.core.scale_loss(loss)?;
        let store = loss.backward()?;
        let grads = Grads::Owned { store, loss: &loss };
        self.core.step(&mut inner, grads, value)
    }

    /// The report of the last step that returned no error.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vec![w.clone()], Clip::norm(1.0))?;
    /// assert!(opt.last_report().is_none());
    /// opt.backward_step(&(w.sqr()?.sum_all()? / 2.0)?)?; // the gradient is (3, 4)
    /// assert_eq!(opt.last_report().unwrap().total_norm()?, 5.0);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn last_report(&self) -> Option<&StepReport> {
        self.core.last_report.as_ref()
    }

    /// The number of steps taken, without skipped and failed ones ([`StepReport::step`] also counts
    /// skipped steps). Use it for a learning rate schedule. Checkpoints store it.
    ///
    /// If a GPU decides the steps, this waits for all launched steps.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// opt.backward_step(&loss)?;
    /// opt.backward_step(&(&loss * f64::NAN)?)?; // is skipped
    /// assert_eq!((opt.last_report().unwrap().step(), opt.steps_taken()?), (2, 1));
    /// let warm_up = (opt.steps_taken()? as f64 / 100.0).min(1.0);
    /// opt.set_learning_rate(0.1 * warm_up);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// A failure of the GPU.
    pub fn steps_taken(&self) -> Result<u64> {
        self.core.steps_taken()
    }

    /// The Vars whose gradients are clipped, with their names.
    #[must_use]
    pub fn vars(&self) -> &NamedVars {
        &self.core.vars
    }

    /// The inner optimizer.
    #[must_use]
    pub fn inner(&self) -> &O {
        &self.inner
    }

    /// The inner optimizer, mutably.
    pub fn inner_mut(&mut self) -> &mut O {
        &mut self.inner
    }

    /// Returns the inner optimizer, without clipping.
    #[must_use]
    pub fn into_inner(self) -> O {
        self.inner
    }
}

impl<O: Optimizer + 'static> Optimizer for ClippedOptimizer<O> {
    type Config = ClippedConfig<O::Config>;

    fn new(vars: Vec<Var>, config: Self::Config) -> candle_core::Result<Self> {
        config.clip.check()?;
        let inner = O::new(vars.clone(), config.inner)?;
        Ok(Self::wrap(inner, vars, config.clip)?)
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        self.step_report(grads)?;
        Ok(())
    }

    fn backward_step(&mut self, loss: &Tensor) -> candle_core::Result<()> {
        self.backward_step_report(loss)?;
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.inner.learning_rate()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.inner.set_learning_rate(lr);
    }
}

/// Shows the inner optimizer's type, so that it needs no `Debug`.
impl<O: Optimizer> fmt::Debug for ClippedOptimizer<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClippedOptimizer")
            .field("inner", &type_name::<O>())
            .field("learning_rate", &self.inner.learning_rate())
            .field("clip", self.core.policy.clip())
            .field("vars", &self.core.vars.vars().len())
            .field("loss_scaler", &self.core.loss_scaler)
            .field("step", &self.core.step)
            .field("last_report", &self.core.last_report)
            .finish_non_exhaustive()
    }
}
