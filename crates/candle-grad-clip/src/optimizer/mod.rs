//! The wrapper: a thin, generic face over [`Core`], which is compiled once.

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

/// An optimizer and what to clip before each of its steps: the config of [`ClippedOptimizer`], for
/// code that makes its optimizer from Vars and a config.
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
    /// What to do to the gradients.
    pub clip: Clip,
}

/// Any candle optimizer with gradient clipping in front of it.
///
/// A step takes the `GradStore` of `backward()`, measures the gradients of the optimizer's Vars,
/// decides by its [`Clip`], edits, and lets the inner optimizer take the step:
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
/// # Who is changed
/// `backward_step` owns the gradients, so it edits them in place. `step(&GradStore)` never changes
/// the caller's: if something is to be clipped, the inner optimizer gets copies, in a buffer that
/// is kept for the next step. An inner optimizer that keeps the gradient *tensors* themselves,
/// rather than numbers computed from them, would see them overwritten by the next `step`; with
/// `backward_step` each step has its own.
///
/// # What counts
/// The Vars that the wrapper has, as far as they get a gradient. Of [`optim`](crate::optim)'s
/// optimizers it knows which Vars they train: one that the wrapper was not given is an error
/// (unless it is [allowed](Self::wrap_allow_unclipped)), and those that they don't train are left
/// out.
///
/// Of other optimizers it can't know. Give it exactly the Vars that they train: the gradients of a
/// frozen layer would count in the global norm (or take its group out by
/// [`no_clip`](crate::optim::ParamGroup::no_clip)), and entries of the store that belong to none of
/// the wrapper's Vars are handed on unclipped, only without the scale of a
/// [`LossScaler`](crate::LossScaler). A store does not tell Vars from constants. So
/// `backward_step`, which has the loss, warns once of Vars that the wrapper was not given, and
/// `step(&GradStore)` can't.
///
/// # One in another
/// A wrapper may be the inner optimizer of another: the outer one clips first, and its report says
/// `skipped` where the inner one skipped. Only the outermost may have a
/// [`LossScaler`](crate::LossScaler).
///
/// # Failure
/// Everything is checked before anything is written, and the inner optimizer is only called with
/// gradients that passed. A step that returns an error, or is skipped, has changed no weight and no
/// state of the inner optimizer. (What this can't promise: an inner `step` that itself fails half
/// way.)
///
/// [`NonFinite`](crate::NonFinite) is about gradients, not about the update: without a limit
/// ([`Clip::none`], an infinite one, the first step of [`Clip::quantile`]) finite gradients near
/// the dtype's largest number can make weights NaN or infinite.
///
/// A coefficient below 1e-6 in ten steps in a row, which leaves next to nothing of the gradients,
/// is warned of once, whatever the rule: see
/// [`StepRecord::tiny_coefs_in_a_row`](crate::StepRecord::tiny_coefs_in_a_row).
pub struct ClippedOptimizer<O: Optimizer> {
    pub(crate) inner: O,
    pub(crate) core: Core,
}

impl<O: Optimizer + 'static> ClippedOptimizer<O> {
    /// Puts `clip` in front of `inner`. `vars` are the Vars that `inner` trains, with their names:
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
    /// A field of `clip` outside its range; for [`Clip::agc`] a pattern that matches no Var, or a Var whose rank it knows no units for;
    /// an f64 Var on Metal, which has no f64; two Vars of one name; an `inner` of [`optim`](crate::optim) that trains a Var which is not among `vars`.
    pub fn wrap(inner: O, vars: impl Into<NamedVars>, clip: Clip) -> Result<Self> {
        Self::wrap_allow_unclipped(inner, vars, clip, &[])
    }

    /// As [`wrap`](Self::wrap), around one of [`optim`](crate::optim)'s optimizers that also trains
    /// Vars without clipping: those that are not among `vars` and whose names in `inner` match one
    /// of these (`*` stands for any characters).
    ///
    /// They are neither measured nor clipped, and no policy looks at them: what is not finite
    /// reaches their weights. A [`LossScaler`](crate::LossScaler)'s scale is taken out of them. A
    /// group with [`no_clip`](crate::optim::ParamGroup::no_clip) is not clipped either, but under
    /// the policy.
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

    /// Takes a step, as [`Optimizer::step`], with its report and with this crate's typed error.
    ///
    /// The caller's gradients are not changed: what is to be clipped is copied into a buffer that
    /// the next step writes over. An inner optimizer must not keep these tensors (see above).
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
    /// Gradients that are not finite under [`NonFinite::Error`](crate::NonFinite::Error); too many
    /// skipped steps in a row; a gradient whose shape, dtype or device is not its Var's, or of an
    /// integer or 8-bit dtype; an error of the inner optimizer. But for the last, nothing is
    /// changed.
    pub fn step_report(&mut self, grads: &GradStore) -> Result<StepReport> {
        self.step_lent(grads, None)
    }

    /// As [`step_report`](Self::step_report), with the loss of the step, for a rule that looks at
    /// it ([`SkipSteps::loss_z`](crate::SkipSteps::loss_z)): the loss itself, not scaled by a
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

    /// `backward`, then a step, as [`Optimizer::backward_step`], with its report and with this
    /// crate's typed error.
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
    /// As [`ClippedOptimizer::step_report`], and those of `backward`; a loss that is not one number
    /// for a rule that looks at it.
    pub fn backward_step_report(&mut self, loss: &Tensor) -> Result<StepReport> {
        let mut inner = Inner::of(&mut self.inner);
        self.core.check_before_step(&inner)?;
        let value = self.core.loss_value(loss)?;
        let loss = self.core.scale_loss(loss)?;
        let store = loss.backward()?;
        let grads = Grads::Owned { store, loss: &loss };
        self.core.step(&mut inner, grads, value)
    }

    /// The report of the last step that did not return an error.
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

    /// How many steps were taken: not skipped, and without an error. What a schedule of learning
    /// rates counts by, while [`StepReport::step`] counts skipped steps too. A checkpoint has it.
    ///
    /// Where a GPU decides the steps, this waits until it has decided those that were launched.
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
    /// A GPU that has failed.
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

    /// The inner optimizer, to change.
    pub fn inner_mut(&mut self) -> &mut O {
        &mut self.inner
    }

    /// The inner optimizer, without its clipping.
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

/// Does not need the inner optimizer's `Debug`: it shows its type.
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
