//! The settings of a [`Clip`] beside its method, and chains.

use candle_grad_clip_kernels::NormType;

use super::config::Clip;
use super::non_finite::NonFinite;
use crate::error::Result;

impl Clip {
    /// Sets the norm that is limited and reported. Default: L2. (`NormType::P(2.0)` becomes L2.)
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let clip = Clip::norm(2.0).norm_type(NormType::Inf);
    /// let report = ClippedOptimizer::wrap(sgd, vars, clip)?.backward_step_report(&loss)?;
    /// assert_eq!(report.total_norm()?, 4.0); // of (3, 4)
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn norm_type(mut self, norm_type: NormType) -> Self {
        self.norm_type = NormType::from(norm_type.p());
        self
    }

    /// Sets what is added to the norm before dividing by it. Default: 1e-6, as in PyTorch; 0 for
    /// [`Clip::block_rms`] and [`Clip::adagc`]; 1e-8 for [`Clip::stabilizer`]. For [`Clip::agc`] it
    /// is [`Agc::eps`](crate::Agc::eps). On a chain it is set for every clip. To set different
    /// values, set them before [`Clip::chain`].
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let clip = Clip::norm(1.0).eps(0.0); // as in TensorFlow
    /// let report = ClippedOptimizer::wrap(sgd, vars, clip)?.backward_step_report(&loss)?;
    /// assert_eq!(report.clip_coef()?, 0.2); // 1 / 5
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn eps(mut self, eps: f64) -> Self {
        for part in &mut self.parts {
            part.eps = eps;
        }
        self
    }

    /// Sets the policy for NaN and infinite gradients. Default: [`NonFinite::SkipStep`].
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let clip = Clip::norm(1.0).non_finite(NonFinite::Error);
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, clip)?;
    /// assert!(opt.backward_step_report(&(loss * f64::INFINITY)?).is_err());
    /// assert!(opt.last_report().is_none()); // no step was taken
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn non_finite(mut self, non_finite: NonFinite) -> Self {
        self.non_finite = non_finite;
        self
    }

    /// Sets how many steps in a row may be skipped. One more is an error. Default: 10.
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0).max_skips(1))?;
    /// let bad = (loss * f64::NAN)?;
    /// assert!(opt.backward_step_report(&bad)?.skipped()?);
    /// assert!(opt.backward_step_report(&bad).is_err()); // the second in a row
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn max_skips(mut self, max_skips: u32) -> Self {
        self.max_skips = max_skips;
        self
    }

    /// Applies several clips in order: each sees the gradients that the one before it produced.
    ///
    /// [`Clip::norm_type`], [`Clip::non_finite`] and [`Clip::max_skips`] apply to the whole chain.
    /// They may be set on any of the clips, or afterwards. A rule that skips the step ends the
    /// chain. The report has the norms before the first clip and after the last. Its `clip_coef` is
    /// the product of all coefficients. [`Clip::none`] is dropped.
    ///
    /// The gradients are read only once. Therefore these are errors: the same method twice,
    /// [`Clip::value`] after a clip that scales, and [`Clip::value`] together with [`Clip::agc`].
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let clip = Clip::chain([Clip::value(3.5), Clip::norm(1.0)])?;
    /// assert_eq!(clip, "value:3.5+norm:1".parse()?);
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, clip)?;
    /// let report = opt.backward_step_report(&loss)?; // (3, 4), then (3, 3.5), then of norm 1
    /// assert_eq!((report.total_norm()?, report.record()?.num_clipped), (5.0, 1));
    /// assert!((report.clip_coef()? - 1.0 / 21.25f64.sqrt()).abs() < 1e-6);
    /// assert!((report.record()?.clipped_norm - 1.0).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidClip`](crate::Error::InvalidClip) for the cases above, and for two different
    /// values of a setting that applies to the whole chain.
    pub fn chain(clips: impl IntoIterator<Item = Clip>) -> Result<Self> {
        Self::chain_of(clips.into_iter().collect())
    }
}
