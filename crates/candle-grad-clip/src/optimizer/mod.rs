pub(crate) mod frozen;
pub(crate) mod late;
mod nested;
mod on_device;
mod overflow;
mod own;
pub(crate) mod report;
mod schedule;
mod trained_vars;

use std::any::type_name;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip_kernels::Edit;
use candle_nn::Optimizer;

use trained_vars::TrainedVars;

use crate::accumulate::hides_overflow;
use crate::checkpoint::WrapperRecord;
use crate::clip::{Action, Clip, Decision, Edits, NonFinite, Policy, SkipReason};
use crate::error::{Error, Result};
use crate::gradients::{Entry, Measurements, Request};
use crate::groups::ParamGroups;
use crate::loss_scaler::LossScaler;
use crate::optim::{self, Clipped};
use crate::optimizer::late::LateSteps;
use crate::optimizer::report::{StepPath, StepRecord, StepReport};
use crate::pipeline::edit::{Scratch, edit_copies, edit_in_place, insert};
use crate::pipeline::measure::{measure_unscaled, non_finite_error};
use crate::pipeline::units::measure_units;
use crate::vars::NamedVars;

/// An optimizer and what to clip before each of its steps: the config of [`ClippedOptimizer`], for code
/// that makes its optimizer from Vars and a config.
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
/// println!("norm {} -> {}", report.total_norm()?, report.clipped_norm()?);
/// assert!(report.missing().is_empty());
/// # Ok(())
/// # }
/// ```
///
/// # Who is changed
/// `backward_step` owns the gradients, so it edits them in place. `step(&GradStore)` never changes
/// the caller's: if something is to be clipped, the inner optimizer gets copies, in a buffer that is
/// kept for the next step. An inner optimizer that keeps the gradient *tensors* themselves, rather
/// than numbers computed from them, would see them overwritten by the next `step`; with
/// `backward_step` each step has its own.
///
/// # What counts
/// The Vars that the wrapper has, as far as they get a gradient. Of [`optim`]'s optimizers it knows which Vars they train: one
/// that the wrapper was not given is an error (unless it is [allowed](Self::wrap_allow_unclipped)), and those that
/// they don't train are left out.
///
/// Of other optimizers it can't know. Give it exactly the Vars that they train: the gradients of a frozen layer would count in the
/// global norm (or take its group out by [`no_clip`](optim::ParamGroup::no_clip)), and entries of the store that belong
/// to none of the wrapper's Vars are handed on unclipped, only without the scale of a [`LossScaler`]. A store does not tell
/// Vars from constants. So `backward_step`, which has the loss, warns once of Vars that the wrapper was not given, and
/// `step(&GradStore)` can't.
///
/// # One in another
/// A wrapper may be the inner optimizer of another: the outer one clips first, and its report says `skipped` where the inner one
/// skipped. Only the outermost may have a [`LossScaler`].
///
/// # Failure
/// Everything is checked before anything is written, and the inner optimizer is only called with
/// gradients that passed. A step that returns an error, or is skipped, has changed no weight and no
/// state of the inner optimizer. (What this can't promise: an inner `step` that itself fails half
/// way.)
///
/// [`NonFinite`] is about gradients, not about the update: without a limit ([`Clip::none`], an infinite one, the first step of
/// [`Clip::quantile`]) finite gradients near the dtype's largest number can make weights NaN or infinite.
///
/// A coefficient below 1e-6 in ten steps in a row, which leaves next to nothing of the gradients, is warned of once, whatever the
/// rule: see [`StepReport::tiny_coefs_in_a_row`].
pub struct ClippedOptimizer<O: Optimizer> {
    inner: O,
    vars: NamedVars,
    trained: TrainedVars,
    policy: Policy,
    /// The limit of each step, in place of the clip's.
    schedule: Option<schedule::Schedule>,
    expect_missing: Vec<String>,
    with_param_norms: bool,
    loss_scaler: Option<LossScaler>,
    /// The number of the last step, taken or skipped.
    step: u64,
    /// As far as the host knows: `late` has counted those that a GPU decided.
    steps_taken: u64,
    skips_in_a_row: u32,
    /// Steps whose results are still on a GPU.
    late: LateSteps,
    /// Copies of gradients for `step(&GradStore)`.
    scratch: Scratch,
    missing: Missing,
    tiny_coefs: frozen::TinyCoefs,
    last_report: Option<StepReport>,
}

/// The Vars that got no gradient in the step before, as most steps miss the same.
#[derive(Default)]
struct Missing {
    indices: Vec<usize>,
    names: Arc<[String]>,
    warned: bool,
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
    /// an f64 Var on Metal, which has no f64; two Vars of one name; an `inner` of [`optim`] that trains a Var which is not among `vars`.
    pub fn wrap(inner: O, vars: impl Into<NamedVars>, clip: Clip) -> Result<Self> {
        Self::wrap_allow_unclipped(inner, vars, clip, &[])
    }

    /// As [`wrap`](Self::wrap), around one of [`optim`]'s optimizers that also trains Vars without clipping: those that are not
    /// among `vars` and whose names in `inner` match one of these (`*` stands for any characters).
    ///
    /// They are neither measured nor clipped, and no policy looks at them: what is not finite reaches their weights. A
    /// [`LossScaler`]'s scale is taken out of them. A group with [`no_clip`](optim::ParamGroup::no_clip) is not clipped
    /// either, but under the policy.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer, Error, optim::Sgd};
    /// # use candle_nn::Optimizer;
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let embed = ("embed".to_string(), Var::new(&[3f64, 4.0], &Device::Cpu)?);
    /// let head = ("head".to_string(), Var::new(&[3f64, 4.0], &Device::Cpu)?);
    /// let sgd = || Sgd::named(vec![embed.clone(), head.clone()], 0.1);
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
        let vars = vars.into();
        vars.check_devices()?;
        let (trained, vars) = TrainedVars::new(&mut inner, vars, allow_unclipped)?;
        let policy = Policy::new(clip, &vars)?;
        if let Some(fused) = optim::fused(&mut inner) {
            trained.adopt(fused, &vars)?;
            fused.trained_mut().settle()?; // another wrapper's skips are not ours
        }
        Ok(Self {
            inner,
            scratch: Scratch::default(),
            vars,
            trained,
            policy,
            schedule: None,
            expect_missing: Vec::new(),
            with_param_norms: false,
            loss_scaler: None,
            step: 0,
            steps_taken: 0,
            skips_in_a_row: 0,
            late: LateSteps::default(),
            missing: Missing::default(),
            tiny_coefs: frozen::TinyCoefs::default(),
            last_report: None,
        })
    }

    /// Takes another [`Clip`], from the next step on: also in the middle of training.
    ///
    /// A clip of the same method keeps what the one before has seen of the training (a shorter window keeps the latest
    /// norms); another method starts anew.
    /// A limit that follows the step: [`with_max_norm_schedule`](Self::with_max_norm_schedule).
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer};
    /// # use candle_nn::{Optimizer, SGD};
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
    /// # let sgd = SGD::new(vec![w.clone()], 0.1)?;
    /// let mut opt = ClippedOptimizer::wrap(sgd, vec![w], Clip::norm(1.0))?;
    /// opt.set_clip(Clip::norm(0.1))?;
    /// assert!(opt.set_clip(Clip::norm(0.0)).is_err()); // would freeze the model
    /// assert_eq!(opt.clip(), &Clip::norm(0.1));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`wrap`](Self::wrap); a [`Clip::value`] or [`Clip::agc`] beside groups with limits. The old one stays then.
    pub fn set_clip(&mut self, clip: Clip) -> Result<()> {
        self.policy.set_clip(clip, &self.vars)
    }

    /// Settings of their own for some Vars, by name: a limit for the norm of each group's gradients, and, if the inner
    /// optimizer is one of [`optim`]'s, learning rate and weight decay. Other optimizers
    /// have but one of each: see [`PerGroup`](optim::PerGroup). There is an example at
    /// [`ParamGroups`](optim::ParamGroups).
    ///
    /// # Errors
    /// A pattern that matches no Var; a learning rate or weight decay for an inner optimizer that can't have its own for
    /// a group; a group's limit beside [`Clip::value`]; a group without clipping beside [`Clip::agc`], which has patterns of its own.
    pub fn groups(mut self, groups: ParamGroups) -> Result<Self> {
        let limits = self.policy.limits_of(groups.clone(), self.vars.names())?;
        if let Some(fused) = optim::fused(&mut self.inner) {
            self.trained.adopt(fused, &self.vars)?;
            fused.trained_mut().set_groups(groups)?;
        } else if groups.has_rates() {
            let group = groups.iter().find(|group| group.has_rates());
            return Err(Error::GroupsNeedFused {
                group: group.map_or_else(String::new, |group| group.name().to_string()),
                optimizer: type_name::<O>(),
            });
        }
        self.policy.set_limits(limits);
        Ok(self)
    }

    /// What is done to the gradients.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let opt = ClippedOptimizer::wrap(sgd, vec![w], Clip::value(0.5))?;
    /// assert_eq!(opt.clip(), &Clip::value(0.5));
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn clip(&self) -> &Clip {
        self.policy.clip()
    }

    /// Vars whose name starts with one of these never get a gradient and are not reported missing:
    /// the running statistics of a batch norm, frozen layers.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer};
    /// # use candle_nn::{Optimizer, SGD};
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
    /// # let sgd = SGD::new(vec![w.clone()], 0.1)?;
    /// let vars = vec![("head".to_string(), w.clone()), ("bn.mean".to_string(), Var::new(0f64, &Device::Cpu)?)];
    /// let opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let mut opt = opt.expect_missing(&["bn."]);
    /// let report = opt.backward_step_report(&w.sqr()?.sum_all()?)?;
    /// assert!(report.missing().is_empty());
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn expect_missing(mut self, name_prefixes: &[&str]) -> Self {
        self.expect_missing
            .extend(name_prefixes.iter().map(ToString::to_string));
        self.missing = Missing::default();
        self
    }

    /// Whether reports carry the norm of each Var's gradient. They are measured anyway; this keeps
    /// them. Default: no.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer};
    /// # use candle_nn::{Optimizer, SGD};
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
    /// # let sgd = SGD::new(vec![w.clone()], 0.1)?;
    /// let vars = vec![("head".to_string(), w.clone())];
    /// let opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
    /// let mut opt = opt.with_param_norms(true);
    /// let report = opt.backward_step_report(&(w.sqr()?.sum_all()? / 2.0)?)?;
    /// assert_eq!(report.largest_param_norms(3)?, [("head", 5.0)]);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_param_norms(mut self, with_param_norms: bool) -> Self {
        self.with_param_norms = with_param_norms;
        self
    }

    /// Lets `loss_scaler` scale the losses. The gradients that [`step`](Optimizer::step) and
    /// [`step_report`](Self::step_report) get must then be those of [`scale_loss`](Self::scale_loss); `backward_step` and
    /// [`backward_step_report`](Self::backward_step_report) scale the loss themselves. The scale changes in steps only, so all
    /// micro-batches of a [`GradAccumulator`](crate::GradAccumulator) have the same.
    ///
    /// Reports, limits and the policy are about the unscaled gradients; what an overflow does is said at [`LossScaler`]. Around
    /// an optimizer that is not one of [`optim`]'s, unscaling writes the gradients (in place or into the wrapper's buffer) as a clip does, and
    /// gradients of f16 Vars that vanish without a scale vanish there.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer, LossScaler, optim::Sgd};
    /// # let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    /// # let sgd = Sgd::named(vec![w.clone()], 0.1)?;
    /// let opt = ClippedOptimizer::wrap(sgd, vec![w.clone()], Clip::norm(1.0))?;
    /// let mut opt = opt.with_loss_scaler(LossScaler::default())?;
    /// let loss = (w.sqr()?.sum_all()? / 2.0)?; // the gradient is w
    /// let grads = opt.scale_loss(&loss)?.backward()?;
    /// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [3.0 * 65536.0, 4.0 * 65536.0]);
    /// let report = opt.step_report(&grads)?;
    /// assert_eq!((report.total_norm()?, report.clip_coef()?), (5.0, 1.0 / (5.0 + 1e-6)));
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// A field of `loss_scaler` outside its range.
    pub fn with_loss_scaler(mut self, loss_scaler: LossScaler) -> Result<Self> {
        loss_scaler.check()?;
        self.loss_scaler = Some(loss_scaler);
        Ok(self)
    }

    /// What scales the losses, as it is now.
    #[must_use]
    pub fn loss_scaler(&self) -> Option<&LossScaler> {
        self.loss_scaler.as_ref()
    }

    /// The loss times the current scale: what to call `backward` of for [`step`](Optimizer::step) or a
    /// [`GradAccumulator`](crate::GradAccumulator). Without a [`LossScaler`] the loss itself.
    ///
    /// # Errors
    /// As [`LossScaler::scale`].
    pub fn scale_loss(&self, loss: &Tensor) -> Result<Tensor> {
        match &self.loss_scaler {
            Some(scaler) => scaler.scale(loss),
            None => Ok(loss.clone()),
        }
    }

    /// Takes a step, as [`Optimizer::step`], with its report and with this crate's typed error.
    ///
    /// The caller's gradients are not changed: what is to be clipped is copied into a buffer that the
    /// next step writes over. An inner optimizer must not keep these tensors (see above).
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
    /// Gradients that are not finite under [`NonFinite::Error`]; too many skipped steps in a row; a
    /// gradient whose shape, dtype or device is not its Var's, or of an integer or 8-bit dtype; an
    /// error of the inner optimizer. But for the last, nothing is changed.
    pub fn step_report(&mut self, grads: &GradStore) -> Result<StepReport> {
        self.step_with(grads, None)
    }

    /// As [`step_report`](Self::step_report), with the loss of the step, for a rule that looks at it
    /// ([`SkipSteps::loss_z`](crate::SkipSteps::loss_z)): the loss itself, not scaled by a [`LossScaler`].
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
        self.step_with(grads, Some(loss))
    }

    fn step_with(&mut self, grads: &GradStore, loss: Option<f64>) -> Result<StepReport> {
        self.check_before_step()?;
        if let Some(report) = self.step_on_device(grads)? {
            return Ok(report);
        }
        let (measured, decision) = self.measure_and_decide(grads, loss)?;
        if let Some(report) = self.fused_step(grads, &measured, &decision)? {
            return Ok(self.finish(report));
        }
        let report = self.report(&measured, &decision, StepPath::Copied);
        let skipped = match &decision.action {
            Action::Refuse(_) => None,
            Action::Leave => nested::step(|| self.inner.step(grads))?,
            Action::Edit(edits) => {
                let others = self.unscaled_others(grads)?;
                let vars = self.vars.list();
                let entries = &measured.entries;
                let mut copies = edit_copies(vars, grads, entries, edits, &mut self.scratch)?;
                insert(&mut copies, others);
                nested::step(|| self.inner.step(&copies))?
            }
        };
        Ok(self.finish_foreign(report, skipped))
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
    /// assert_eq!((report.step(), report.num_clipped()?), (1, 2));
    /// assert_eq!(w.to_vec1::<f64>()?, [2.9, 3.9]); // a step of 0.1 along (1, 1)
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ClippedOptimizer::step_report`], and those of `backward`; a loss that is not one number for a rule that looks at it.
    pub fn backward_step_report(&mut self, loss: &Tensor) -> Result<StepReport> {
        self.check_before_step()?;
        let value = self
            .policy
            .reads_loss()
            .then(|| loss_value(loss))
            .transpose()?;
        let loss = self.scale_loss(loss)?;
        let mut grads = loss.backward()?;
        if let Some(report) = self.step_on_device(&grads)? {
            return Ok(report);
        }
        let (measured, decision) = self.measure_and_decide(&grads, value)?;
        if let Some(report) = self.fused_step(&grads, &measured, &decision)? {
            return Ok(self.finish(report));
        }
        let found = measured.entries.iter();
        let found = found.filter(|entry| entry.grad.is_some()).count();
        self.notice_unknown(&loss, &grads, found);
        let report = self.report(&measured, &decision, StepPath::InPlace);
        let skipped = match &decision.action {
            Action::Refuse(_) => None,
            Action::Leave => nested::step(|| self.inner.step(&grads))?,
            Action::Edit(edits) => {
                let others = self.unscaled_others(&grads)?;
                let replacements =
                    edit_in_place(self.vars.list(), &grads, &measured.entries, edits)?;
                insert(&mut grads, replacements);
                insert(&mut grads, others);
                nested::step(|| self.inner.step(&grads))?
            }
        };
        Ok(self.finish_foreign(report, skipped))
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
        self.last_report.as_ref()
    }

    /// How many steps were taken: not skipped, and without an error. What a schedule of learning rates counts by, while
    /// [`StepReport::step`] counts skipped steps too. A checkpoint has it.
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
        Ok(self.steps_taken + self.late.steps_taken()?)
    }

    /// The Vars whose gradients are clipped, with their names.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let opt = ClippedOptimizer::wrap(sgd, vec![w], Clip::norm(1.0))?;
    /// let elements: usize = opt.vars().vars().iter().map(|var| var.elem_count()).sum();
    /// assert_eq!(elements, 2);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn vars(&self) -> &NamedVars {
        &self.vars
    }

    /// The inner optimizer.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let opt = ClippedOptimizer::wrap(sgd, vec![w], Clip::norm(1.0))?;
    /// assert_eq!(opt.inner().learning_rate(), 0.1);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn inner(&self) -> &O {
        &self.inner
    }

    /// The inner optimizer, to change.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vec![w], Clip::norm(1.0))?;
    /// opt.inner_mut().set_learning_rate(0.01);
    /// assert_eq!(opt.learning_rate(), 0.01);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    pub fn inner_mut(&mut self) -> &mut O {
        &mut self.inner
    }

    /// The inner optimizer, without its clipping.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let opt = ClippedOptimizer::wrap(sgd, vec![w], Clip::norm(1.0))?;
    /// let sgd: SGD = opt.into_inner();
    /// assert_eq!(sgd.learning_rate(), 0.1);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn into_inner(self) -> O {
        self.inner
    }

    /// A step of an inner optimizer that is one of ours, with what was decided folded into its update.
    fn fused_step(
        &mut self,
        grads: &GradStore,
        measured: &Measurements<'_>,
        decision: &Decision,
    ) -> Result<Option<StepReport>> {
        let edits = match &decision.action {
            Action::Refuse(_) => return Ok(None),
            Action::Leave => &Edits::All(Edit::NOTHING),
            Action::Edit(edits) => edits,
        };
        let scale = self.loss_scale();
        let Some(fused) = optim::fused(&mut self.inner) else {
            return Ok(None);
        };
        self.trained.adopt(fused, &self.vars)?; // again, as `inner_mut` may have put another in its place
        let clipped = Clipped {
            vars: &self.vars,
            entries: &measured.entries,
            edits,
            others: Edit::NOTHING.of_scaled(scale),
        };
        fused.fused_step(grads, Some(clipped))?;
        Ok(Some(self.report(measured, decision, StepPath::Fused)))
    }

    /// What ends a step before it began, whatever its gradients are; and what is looked for at each step.
    fn check_before_step(&mut self) -> Result<()> {
        if self.loss_scaler.is_some() && nested::is_inside() {
            return Err(Error::NestedLossScaler);
        }
        self.check_learning_rate()?;
        self.trained.notice_growth();
        Ok(())
    }

    /// As [`finish`](Self::finish), of an inner optimizer in which another wrapper may have skipped the step.
    fn finish_foreign(
        &mut self,
        mut report: StepReport,
        skipped: Option<SkipReason>,
    ) -> StepReport {
        if let Some(reason) = skipped {
            report.record.skipped = true;
            report.record.skip_reason = Some(reason);
            report.record.path = StepPath::Skipped;
        }
        self.finish(report)
    }

    fn loss_scale(&self) -> f64 {
        self.loss_scaler
            .as_ref()
            .map_or(1.0, LossScaler::current_scale)
    }

    /// What is measured, and what is to be done, with the errors that end a step before it began.
    fn measure_and_decide<'g>(
        &mut self,
        grads: &'g GradStore,
        loss: Option<f64>,
    ) -> Result<(Measurements<'g>, Decision)> {
        let scaler = self.loss_scaler.as_ref();
        if scaler.is_some_and(LossScaler::is_enabled) && hides_overflow(grads) {
            return Err(Error::HiddenOverflow);
        }
        let mut measured = self.measure(grads, loss, self.policy.request())?;
        let non_finite = self.policy.clip().non_finite;
        let mut set_aside = self.policy.limits().set_aside(&mut measured, non_finite);
        let names = self.vars.shared_names();
        // Not asked about an overflow of the loss's scale, which ends the step.
        let overflows = self.loss_scale() > 1.0 && measured.total.stats.non_finite() > 0;
        if !overflows && let Some(bound) = self.policy.ask(&measured, names, self.step + 1)? {
            let request = Request {
                clip_value: Some(bound),
                ..self.policy.request()
            };
            measured = self.measure(grads, loss, request)?;
            set_aside = self.policy.limits().set_aside(&mut measured, non_finite);
        }
        let mut decision = self.decide(grads, &measured)?;
        let scale = self.loss_scale();
        let limits = self.policy.limits();
        limits.put_back(set_aside, &mut measured, &mut decision, scale);
        Ok((measured, decision))
    }

    /// Measures the gradients as they are without the loss's scale.
    fn measure<'g>(
        &self,
        grads: &'g GradStore,
        loss: Option<f64>,
        request: Request,
    ) -> Result<Measurements<'g>> {
        let (vars, scale) = (self.vars.list(), self.loss_scale());
        let measured = match self.policy.units() {
            Some(units) => measure_units(vars, grads, request.norm_type, units, scale),
            None => measure_unscaled(vars, grads, request, scale),
        };
        Ok(Measurements { loss, ..measured? })
    }

    /// The decision, with the errors that end a step before it began.
    fn decide(&mut self, grads: &GradStore, measured: &Measurements<'_>) -> Result<Decision> {
        let scale = self.loss_scale();
        let bad = measured.total.stats.non_finite();
        if scale > 1.0 && bad > 0 {
            let step = self.step + 1;
            tracing::debug!(
                step,
                scale,
                non_finite = bad,
                "step skipped: the loss scale is too large"
            );
            return Ok(Decision::refuse(SkipReason::NonFinite));
        }
        let decision = self.policy.decide(measured).of_scaled(scale);
        let overflow = self.overflow(grads, &decision)?;
        let decision = match overflow {
            Some(_) => Decision::refuse(SkipReason::NonFinite),
            None => decision,
        };
        let Action::Refuse(reason) = decision.action else {
            return Ok(decision);
        };
        if reason == SkipReason::NonFinite && self.policy.clip().non_finite == NonFinite::Error {
            if let Some(overflow) = overflow {
                return Err(self.overflow_error(overflow));
            }
            return Err(non_finite_error(self.vars.list(), measured));
        }
        let skips = self.skips_in_a_row.saturating_add(1);
        let max_skips = self.policy.clip().max_skips;
        self.skips_in_a_row = skips;
        let step = self.step + 1;
        match reason {
            SkipReason::NonFinite => {
                let first = overflow.map(|overflow| overflow.index);
                let first = first.or_else(|| measured.first_non_finite());
                let var = self.vars.names()[first.unwrap_or(0)].clone();
                if skips > max_skips {
                    return Err(Error::TooManySkips {
                        skips,
                        max_skips,
                        var,
                    });
                }
                let bad = measured.total.stats.non_finite();
                tracing::warn!(
                    step,
                    var,
                    non_finite = bad,
                    "step skipped: gradients are not finite"
                );
            }
            SkipReason::LargeNorm => {
                let total_norm = measured.norm().value();
                if skips > max_skips {
                    return Err(Error::TooManyLargeNorms {
                        skips,
                        max_skips,
                        total_norm,
                        clip: self.policy.clip().to_string(),
                    });
                }
                tracing::warn!(step, total_norm, "step skipped: the norm is too large");
            }
            SkipReason::LargeLoss => {
                let loss = measured.loss.unwrap_or(f64::NAN);
                if skips > max_skips {
                    return Err(Error::TooManyLargeLosses {
                        skips,
                        max_skips,
                        loss,
                        clip: self.policy.clip().to_string(),
                    });
                }
                tracing::warn!(step, loss, "step skipped: the loss is too large");
            }
            SkipReason::Rule => {
                let total_norm = measured.norm().value();
                if skips > max_skips {
                    return Err(Error::TooManyRuleSkips {
                        skips,
                        max_skips,
                        total_norm,
                    });
                }
                tracing::warn!(step, total_norm, "step skipped: by the ClipRule");
            }
        }
        Ok(decision)
    }

    fn report(
        &mut self,
        measured: &Measurements<'_>,
        decision: &Decision,
        path: StepPath,
    ) -> StepReport {
        let step = self.step + 1;
        let non_finite = self.policy.clip().non_finite;
        let record = StepRecord::new(step, measured, decision, non_finite, path);
        let param_norms = self.with_param_norms.then(|| measured.param_norms().into());
        let missing = self.missing(&measured.entries);
        StepReport {
            record,
            late: None,
            missing,
            names: self.vars.shared_names().clone(),
            param_norms,
        }
    }

    /// Names of the float Vars without a gradient; warns of them once.
    fn missing(&mut self, entries: &[Entry<'_>]) -> Arc<[String]> {
        let vars = self.vars.vars();
        let expected = |name: &str| {
            self.expect_missing
                .iter()
                .any(|prefix| name.starts_with(prefix))
        };
        let without = entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| entry.grad.is_none());
        let indices: Vec<usize> = without
            .map(|(index, _)| index)
            .filter(|&index| vars[index].dtype().is_float() && !expected(&self.vars.names()[index]))
            .collect();
        if indices != self.missing.indices {
            self.missing.names = indices
                .iter()
                .map(|&index| self.vars.names()[index].clone())
                .collect();
            self.missing.indices = indices;
        }
        if !self.missing.names.is_empty() && !self.missing.warned {
            self.missing.warned = true;
            tracing::warn!(
                missing = ?self.missing.names,
                of = vars.len(),
                "Vars without a gradient are not trained: is there an operation without backward in \
                 front of them (LayerNorm::forward, RmsNorm::forward, softmax_last_dim, rope)?"
            );
        }
        self.missing.names.clone()
    }

    /// The step is done as decided: only now the rules' histories take it in.
    fn finish(&mut self, mut report: StepReport) -> StepReport {
        self.step = report.record.step;
        if !report.record.skipped {
            self.policy.observe();
            self.steps_taken += 1;
            self.skips_in_a_row = 0;
        }
        nested::tell(report.record.skip_reason);
        let finite = report.record.non_finite == 0;
        // Not for a step that the policy took all the same.
        if let Some(scaler) = &mut self.loss_scaler
            && (finite || report.record.skipped)
        {
            scaler.update(!finite);
        }
        let StepRecord {
            step,
            total_norm,
            clipped_norm,
            clip_coef,
            skipped,
            ..
        } = report.record;
        tracing::debug!(step, total_norm, clipped_norm, clip_coef, skipped, "step");
        report.record.tiny_coefs_in_a_row = if skipped {
            self.tiny_coefs.in_a_row()
        } else {
            self.tiny_coefs.count(step, total_norm, clip_coef)
        };
        self.last_report = Some(report.clone());
        report
    }
}

/// The loss as a number, read from its device.
fn loss_value(loss: &Tensor) -> Result<f64> {
    if loss.elem_count() != 1 {
        return Err(Error::LossShape {
            shape: loss.dims().to_vec(),
        });
    }
    let value = loss
        .detach()
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?;
    Ok(value.flatten_all()?.to_vec1::<f64>()?[0])
}

/// Checkpoints, of the optimizers that have them.
impl<O: optim::Checkpoint> ClippedOptimizer<O> {
    /// Saves the inner optimizer as its own `save` does, and beside it the [`Clip`] with its history, the counters of steps and of
    /// steps taken, the skips in a row and the [`LossScaler`]; not the weights (see [`optim`](crate::optim#checkpoints)).
    ///
    /// # Errors
    /// As [`optim::AdamW::save`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_with(path.as_ref(), false)
    }

    /// As [`save`](Self::save), also where the state is NaN or infinite: see
    /// [`optim::AdamW::save_non_finite`].
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_non_finite(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_with(path.as_ref(), true)
    }

    fn save_with(&self, path: &Path, non_finite: bool) -> Result<()> {
        let wrapper = WrapperRecord {
            clip: self.policy.clip().clone(),
            rule: self.policy.record(self.vars.names()),
            step: self.step,
            steps_taken: Some(self.steps_taken()?),
            skips_in_a_row: self.late.skips_in_a_row()?.unwrap_or(self.skips_in_a_row),
            loss_scaler: self.loss_scaler.as_ref().map(|scaler| scaler.0.clone()),
            own_rule: self.policy.custom_record(),
        };
        self.inner
            .save_to(path, Some((&self.vars, wrapper)), non_finite)
    }

    /// Goes on from what [`save`](Self::save) wrote. The [`Clip`], its history and the counters become those of the file, as the inner
    /// optimizer's hyper-parameters do; those of the wrapper stay if the file is of an optimizer without one, and its [`LossScaler`] if the
    /// file has none. There is no
    /// [`last_report`](Self::last_report) then. The weights must be loaded as well (see
    /// [`optim`](crate::optim#checkpoints)).
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
    /// let make = |clip| ClippedOptimizer::wrap(Sgd::named(vars.clone(), 0.1)?, vars.clone(), clip);
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
        self.trained.adopt(&mut self.inner, &self.vars)?; // `inner_mut` may have put another in its place
        let path = path.as_ref();
        let steps_taken = self.steps_taken()?;
        let (vars, policy) = (&self.vars, &mut self.policy);
        let mut resumed = None;
        let mut check = |wrapper: &WrapperRecord| {
            let saved = (&wrapper.clip, &wrapper.rule, &wrapper.own_rule[..]);
            resumed = Some(policy.resumed(saved, vars, path)?);
            Ok(())
        };
        if let Some(wrapper) = self.inner.load_from(path, &mut check)? {
            if let Some(resumed) = resumed {
                self.policy.resume(resumed);
            }
            self.step = wrapper.step;
            self.steps_taken = wrapper.steps_taken.unwrap_or(steps_taken);
            self.skips_in_a_row = wrapper.skips_in_a_row;
            if let Some(scaling) = wrapper.loss_scaler {
                self.loss_scaler = Some(LossScaler(scaling));
            }
        } else {
            self.steps_taken = steps_taken;
        }
        self.late = LateSteps::default();
        self.tiny_coefs = frozen::TinyCoefs::default();
        self.last_report = None;
        Ok(())
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
            .field("clip", self.policy.clip())
            .field("vars", &self.vars.vars().len())
            .field("loss_scaler", &self.loss_scaler)
            .field("step", &self.step)
            .field("last_report", &self.last_report)
            .finish_non_exhaustive()
    }
}
