//! The reasons for skipping a step.

/// Why a step was skipped; see [`StepRecord::skip_reason`](crate::StepRecord::skip_reason).
///
/// ```
#[doc = include_str!("step_example.md")]
/// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?;
/// let report = opt.backward_step_report(&(loss * f64::NAN)?)?;
/// assert_eq!(report.record()?.skip_reason, Some(candle_grad_clip::SkipReason::NonFinite));
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum SkipReason {
    /// Gradients were NaN or infinite, under [`NonFinite::SkipStep`](crate::NonFinite::SkipStep) or
    /// with a [`LossScaler`](crate::LossScaler)'s scale above 1.
    NonFinite,
    /// Gradients were finite, but scaling them up would have made one infinite: with a loss scale
    /// below 1, or by a [`ClipRule`](crate::ClipRule).
    Overflow,
    /// The norm was too large for the rule; the gradients were finite.
    LargeNorm,
    /// The loss was too large for the rule. The gradients were finite.
    LargeLoss,
    /// A [`ClipRule`](crate::ClipRule) decided to skip.
    Rule,
}
