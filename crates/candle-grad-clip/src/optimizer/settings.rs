//! The wrapper's settings.

use std::any::type_name;

use candle_core::Tensor;
use candle_nn::Optimizer;

use super::ClippedOptimizer;
use super::core::Schedule;
use super::inner::Inner;
use crate::clip::{Clip, ClipRule};
use crate::error::Result;
use crate::groups::ParamGroups;
use crate::loss_scaler::LossScaler;

impl<O: Optimizer + 'static> ClippedOptimizer<O> {
    /// Replaces the [`Clip`] from the next step on, also during training.
    ///
    /// A clip of the same method keeps the history (a shorter window keeps the latest norms);
    /// another method starts without one. To change only the limit per step, use
    /// [`with_max_norm_schedule`](Self::with_max_norm_schedule).
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
    /// As [`wrap`](Self::wrap). A [`Clip::value`] or [`Clip::agc`] together with groups that have
    /// limits. On error the old clip stays.
    pub fn set_clip(&mut self, clip: Clip) -> Result<()> {
        self.core.policy.set_clip(clip, &self.core.vars)
    }

    /// Sets options for groups of Vars, by name: a limit for the norm of each group's gradients
    /// and, for a fused optimizer ([`optim`](crate::optim)), learning rate and weight decay. Other
    /// optimizers have only one of each: see [`GroupedOptimizer`](crate::optim::GroupedOptimizer).
    /// For an example see [`ParamGroups`](crate::optim::ParamGroups).
    ///
    /// # Errors
    /// A pattern that matches no Var. A group's learning rate or weight decay for an optimizer that
    /// does not support it. A group's limit with [`Clip::value`]. A group without clipping with
    /// [`Clip::agc`], which has its own patterns.
    pub fn with_param_groups(mut self, groups: ParamGroups) -> Result<Self> {
        self.core
            .set_groups(&mut Inner::of(&mut self.inner), groups, type_name::<O>())?;
        Ok(self)
    }

    /// The current clip.
    #[must_use]
    pub fn clip(&self) -> &Clip {
        self.core.policy.clip()
    }

    /// Declares Vars that never get a gradient, by prefixes of their names: target networks, frozen
    /// layers. `*` stands for any characters: `*.running_` is the running statistics of every batch
    /// norm. Reports and warnings leave these Vars out.
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
    /// let mut opt = opt.ignore_missing_grads(&["bn."]);
    /// let report = opt.backward_step_report(&w.sqr()?.sum_all()?)?;
    /// assert!(report.missing_grads().is_empty());
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn ignore_missing_grads(mut self, name_prefixes: &[&str]) -> Self {
        self.core.missing.expect(name_prefixes);
        self
    }

    /// Whether reports include the norm of each Var's gradient. Default: false.
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
    /// assert_eq!(report.record()?.largest_param_norms(3), [("head", 5.0)]);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_param_norms(mut self, with_param_norms: bool) -> Self {
        self.core.with_param_norms = with_param_norms;
        self
    }

    /// Adds loss scaling. The gradients for [`step`](Optimizer::step) and
    /// [`step_report`](Self::step_report) must then be those of [`scale_loss`](Self::scale_loss).
    /// `backward_step` and [`backward_step_report`](Self::backward_step_report) scale the loss
    /// themselves. The scale changes only in steps, so all micro-batches of a
    /// [`GradAccumulator`](crate::GradAccumulator) have the same scale.
    ///
    /// Reports, limits and the policy use the unscaled gradients. For the effect of an overflow see
    /// [`LossScaler`]. Around an optimizer that is not fused, unscaling writes the gradients like a
    /// clip (in place or to the wrapper's buffer). Gradients of f16 Vars that underflow without a
    /// scale underflow there.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{Clip, ClippedOptimizer, LossScaler, optim::Sgd};
    /// # let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    /// # let sgd = Sgd::from_named_vars(vec![w.clone()], 0.1)?;
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
        self.core.loss_scaler = Some(loss_scaler);
        Ok(self)
    }

    /// The loss scaler in its current state.
    #[must_use]
    pub fn loss_scaler(&self) -> Option<&LossScaler> {
        self.core.loss_scaler.as_ref()
    }

    /// The loss times the current scale; call `backward` on it for [`step`](Optimizer::step) or a
    /// [`GradAccumulator`](crate::GradAccumulator). Without a [`LossScaler`] this is the loss
    /// itself.
    ///
    /// # Errors
    /// As [`LossScaler::scale`].
    pub fn scale_loss(&self, loss: &Tensor) -> Result<Tensor> {
        self.core.scale_loss(loss)
    }

    /// Uses your own rule to decide. The wrapper's `Clip` must be [`Clip::none`]; its
    /// [`norm_type`](Clip::norm_type), [`non_finite`](Clip::non_finite) and
    /// [`max_skips`](Clip::max_skips) apply. Groups may have their own limits. For an example see
    /// [`ClipRule`].
    ///
    /// A checkpoint stores the result of [`ClipRule::save`]. Set the rule before loading a
    /// checkpoint.
    ///
    /// # Errors
    /// A clip that is not `Clip::none()`.
    pub fn with_rule(mut self, rule: impl ClipRule + 'static) -> Result<Self> {
        self.core.policy.set_rule(rule)?;
        Ok(self)
    }

    /// Sets the limit of each step by a function of the step's number. The number starts at 1 and
    /// includes skipped steps: it is the number in the report, not
    /// [`steps_taken`](Self::steps_taken).
    ///
    /// The function sets the `max_norm` of [`Clip::norm`] or [`Clip::param_norm`], else that of
    /// [`ZClip`](crate::ZClip) or [`SkipSteps`](crate::SkipSteps), else the limit of
    /// [`Clip::value`] or [`Clip::block_rms`]. [`clip`](Self::clip) shows the limit of the latest
    /// step. A checkpoint stores the step's number but not the function, so a resumed run must set
    /// it again.
    ///
    /// The function is called once in each call that takes or skips a step, and in one that fails
    /// after `backward`. A failed step is retried with the same number.
    ///
    /// A linear warm-up from 0.1 to 1 in 1000 steps:
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let warm_up = |step: u64| 0.1 + 0.9 * (step as f64 / 1000.0).min(1.0);
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?.with_max_norm_schedule(warm_up)?;
    /// let report = opt.backward_step_report(&loss)?; // norm 5, step 1
    /// assert!((report.record()?.clipped_norm - 0.1009).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// A clip without a limit, or with two possible ones. If the function returns 0, a negative
    /// number or NaN, the step fails and changes nothing.
    pub fn with_max_norm_schedule(
        mut self,
        max_norm: impl Fn(u64) -> f64 + Send + Sync + 'static,
    ) -> Result<Self> {
        self.core.set_schedule(Schedule(Box::new(max_norm)))?;
        Ok(self)
    }
}
