//! The decide phase: from the measured norms to edits of the gradients. One file per method.
//! A [`Clip`] is plain configuration. A [`Policy`] holds the running rules and their histories.

mod adagc;
mod agc;
mod auto;
mod block_rms;
mod chain;
mod coef;
mod config;
mod custom;
mod decision;
mod edits;
mod groups;
mod history;
mod methods;
mod non_finite;
mod none;
mod norm;
mod options;
mod param_norm;
mod per_var;
mod policy;
mod quantile;
pub(crate) mod record;
mod rule;
mod set_aside;
mod settings;
mod skip;
mod stabilizer;
mod text;
mod value;
mod zclip;

pub use adagc::AdaGc;
pub use agc::{Agc, AgcUnits};
pub use auto::AutoClip;
pub(crate) use coef::{CLIP_EPS, TINY_COEF, clip_coef};
pub use config::Clip;
pub use custom::{ClipDecision, ClipRule, GradNorms};
pub use decision::GroupRecord;
pub(crate) use decision::{Action, Decision};
pub(crate) use edits::Edits;
pub use non_finite::NonFinite;
pub(crate) use policy::{Policy, Resumed};
pub use quantile::QuantileClip;
pub use skip::SkipSteps;
pub use stabilizer::GradientStabilizer;
pub use zclip::{ZClip, ZClipMode};

use block_rms::BlockRms;
use none::NoClip;
use norm::Norm;
use param_norm::ParamNorm;
use value::Value;

impl Clip {
    /// Measures and reports the norms, and changes no gradient.
    ///
    /// The non-finite policy still applies: a step with a NaN is skipped unless
    /// [`Clip::non_finite`] says otherwise. The policy checks the gradients, not the update. As
    /// nothing is limited here, finite gradients near the dtype's largest number can still make
    /// weights NaN or infinite.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::none())?;
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert_eq!((report.total_norm()?, report.record()?.clipped_norm), (5.0, 5.0));
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn none() -> Self {
        Self::new(NoClip)
    }

    /// Clips the global norm to `max_norm`, which must be above 0. An infinite limit only measures.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(2.5))?;
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert!((report.record()?.clipped_norm - 2.5).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn norm(max_norm: f64) -> Self {
        Self::new(Norm { max_norm })
    }

    /// Clips every element to `[-clip_value, clip_value]`, which changes the gradient's direction.
    /// `clip_value` must be above 0. An infinite limit only measures.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::value(3.5))?;
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert_eq!(report.record()?.num_clipped, 1);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn value(clip_value: f64) -> Self {
        Self::new(Value { clip_value })
    }

    /// Clips the norm of each Var's gradient individually to `max_norm`, which must be above 0. An
    /// infinite limit only measures.
    ///
    /// `g_i * min(1, max_norm / (param_norm_i + eps))`. The update's direction changes if only some
    /// Vars are clipped. [`StepReport::clip_coef`](crate::StepReport::clip_coef) is the smallest of
    /// the coefficients.
    ///
    /// # References
    /// Keras' `clipnorm`, burn's `GradientClippingConfig::Norm`; PyTorch's `clip_grad_norm_` called
    /// for each parameter.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::param_norm(2.5))?;
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert!((report.clip_coef()? - 0.5).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn param_norm(max_norm: f64) -> Self {
        Self::new(ParamNorm { max_norm })
    }

    /// Clips the root mean square of each Var's gradient individually to `max_rms`, which must be
    /// above 0. An infinite limit only measures.
    ///
    /// `g_i * min(1, max_rms / (rms_i + eps))` with `rms_i = sqrt(mean(g_i^2))`. The default `eps`
    /// is 0. With a [`Clip::norm_type`] of p, `rms_i` is `mean(|g_i|^p)^(1/p)`. Source:
    /// `optax.clip_by_block_rms` (optax 0.2.8).
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::block_rms(1.0))?;
    /// let report = opt.backward_step_report(&loss)?; // the gradient is (3, 4)
    /// assert!((report.record()?.clipped_norm - 2f64.sqrt()).abs() < 1e-12); // 2 elements, rms 1
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn block_rms(max_rms: f64) -> Self {
        Self::new(BlockRms { max_rms })
    }

    /// AutoClip: clips the global norm to a percentile of the norms so far. `percentile` is 0 to
    /// 100; the paper uses 10.
    ///
    /// See [`AutoClip`] for the equation and the length of the history. Source: Seetharaman and
    /// others (2020), arXiv 2007.14469.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::autoclip(50.0))?;
    /// opt.backward_step(&loss)?; // norm 5, the first: w becomes 0.9 (3, 4)
    /// let report = opt.backward_step_report(&(loss * 3.0)?)?; // norm 13.5
    /// assert!((report.record()?.clipped_norm - 9.25).abs() < 1e-5); // the median of 5 and 13.5
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn autoclip(percentile: f64) -> Self {
        AutoClip {
            percentile,
            window: None,
        }
        .into()
    }

    /// Clips the global norm to a running estimate of the norms' `target` quantile (between 0 and
    /// 1).
    ///
    /// See [`QuantileClip`] for the equation and its rate. Source: Andrew and others (2021), arXiv
    /// 1905.03871.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::quantile(0.5))?;
    /// opt.backward_step(&loss)?; // norm 5: the limit becomes 5 exp(-0.1)
    /// let report = opt.backward_step_report(&(loss * 2.0)?)?;
    /// assert!((report.record()?.clipped_norm - 5.0 * (-0.1f64).exp()).abs() < 1e-5);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn quantile(target: f64) -> Self {
        QuantileClip {
            target,
            ..QuantileClip::default()
        }
        .into()
    }

    /// ZClip with its authors' defaults: clips norms far above the running mean, and every norm to
    /// 1.
    ///
    /// See [`ZClip`] for the equations and options. Source: Kumar and others (2025), arXiv
    /// 2504.02507.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::zclip())?;
    /// let report = opt.backward_step_report(&loss)?; // a step of the warm-up
    /// assert!((report.record()?.clipped_norm - 1.0).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn zclip() -> Self {
        ZClip::default().into()
    }

    /// AdaGC with its paper's defaults: clips each Var's gradient norm to 1.05 times its running
    /// mean.
    ///
    /// See [`AdaGc`] for the equations and options. Source: Wang and others (2025), arXiv
    /// 2502.11034.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::adagc())?;
    /// let report = opt.backward_step_report(&loss)?; // a step of the warm-up
    /// assert!((report.record()?.clipped_norm - 1.0).abs() < 1e-12);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn adagc() -> Self {
        AdaGc::default().into()
    }

    /// AGC with its paper's defaults: clips the gradient norm of each unit (row) of each Var to
    /// 0.01 times the norm of the unit's weights.
    ///
    /// See [`Agc`] for the equation, other units and excluded Vars. Source: Brock and others
    /// (2021), arXiv 2102.06171.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::agc())?;
    /// let report = opt.backward_step_report(&loss)?; // gradient and weights are (3, 4), one unit
    /// assert!((report.record()?.clipped_norm - 0.05).abs() < 1e-12);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn agc() -> Self {
        Agc::default().into()
    }

    /// GradientStabilizer with its authors' defaults: replaces the norm of each Var's gradient by a
    /// length near 1 that follows running means, and needs no limit.
    ///
    /// See [`GradientStabilizer`] for the equation, and for what it does to small gradients. Source:
    /// Huang and others (2026), arXiv 2502.17055.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::stabilizer())?;
    /// let report = opt.backward_step_report(&(&loss / 100.0)?)?; // norm 0.05
    /// assert!((report.clip_coef()? - 20.0).abs() < 1e-4); // enlarged to 1
    /// let report = opt.backward_step_report(&(&loss * 1e9)?)?; // a spike
    /// assert!(report.record()?.clipped_norm < 1.0);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn stabilizer() -> Self {
        GradientStabilizer::default().into()
    }

    /// Skips steps whose global norm is above `norm`. The gradients of other steps are not changed.
    ///
    /// See [`SkipSteps`] to clip the other steps as well.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::skip_above_norm(4.0))?;
    /// assert!(opt.backward_step_report(&loss)?.skipped()?); // norm 5
    /// assert_eq!(w.to_vec1::<f64>()?, [3.0, 4.0]); // as it was
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # References
    /// Megatron-LM, which skips a step whose norm is above a fixed limit.
    #[must_use]
    pub fn skip_above_norm(norm: f64) -> Self {
        SkipSteps {
            norm,
            ..SkipSteps::default()
        }
        .into()
    }

    /// Skips steps whose global norm is more than `z` standard deviations above the mean of the
    /// last 128.
    ///
    /// See [`SkipSteps`] for the equation and other windows.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::skip_above_zscore(6.0))?;
    /// let loss_of_norm = |norm: f64| (w.narrow(0, 0, 1)? * norm)?.sum_all();
    /// for step in 0..64 {
    ///     opt.backward_step(&loss_of_norm(1.0 + f64::from(step % 2))?)?; // norms 1 and 2
    /// }
    /// assert!(opt.backward_step_report(&loss_of_norm(10.0)?)?.skipped()?);
    /// assert!(!opt.backward_step_report(&loss_of_norm(2.0)?)?.skipped()?);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # References
    /// OLMo-core's `SkipStepOptimizer`: z 6.
    #[must_use]
    pub fn skip_above_zscore(z: f64) -> Self {
        SkipSteps {
            z,
            ..SkipSteps::default()
        }
        .into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod testing;
