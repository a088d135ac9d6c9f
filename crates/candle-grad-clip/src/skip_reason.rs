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

/// The text of [`Error::TooManySkips`](crate::Error::TooManySkips).
pub(crate) fn too_many_skips(
    reason: SkipReason,
    skips: u32,
    max_skips: u32,
    var: Option<&str>,
    total_norm: f64,
    loss: Option<f64>,
    clip: &str,
) -> String {
    let weights = "the weights are as they were before the first of them";
    if reason == SkipReason::NonFinite {
        let var = var.unwrap_or("unknown");
        return format!(
            "gradients were not finite in {skips} step(s) in a row, more than max_skips = {max_skips}: the first bad Var is \
             {var}; {weights}; lower the learning rate or look at the data"
        );
    }
    if reason == SkipReason::Overflow {
        let var = var.unwrap_or("unknown");
        return format!(
            "{skips} step(s) in a row were skipped, more than max_skips = {max_skips}: the clipped gradient of {var} would not \
             be finite in the dtype that it is kept in; {weights}; clip to a smaller norm"
        );
    }
    let start =
        format!("{skips} step(s) in a row were skipped, more than max_skips = {max_skips}: ");
    let end = match reason {
        SkipReason::LargeNorm => format!(
            "the norm {total_norm} is too large for the rule {clip}; {weights}; lower the learning rate, or take a rule that \
             allows more"
        ),
        SkipReason::LargeLoss => {
            let loss = loss.unwrap_or(f64::NAN);
            format!(
                "the loss {loss} is too large for the rule {clip}; {weights}; look at the data, or take a rule that allows more"
            )
        }
        _ => format!("the ClipRule skipped a step of norm {total_norm}; {weights}"),
    };
    start + &end
}
