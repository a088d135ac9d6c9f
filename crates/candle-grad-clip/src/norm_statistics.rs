//! Norm statistics over many steps.

use crate::error::Result;
use crate::optimizer::StepReport;

/// Norm statistics over many steps: how often gradients were clipped, and which `max_norm` to
/// choose.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::{Clip, ClippedOptimizer, NormStatistics};
/// use candle_nn::{Optimizer, SGD};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let mut opt = ClippedOptimizer::wrap(SGD::new(vec![w.clone()], 0.1)?, vec![w.clone()], Clip::none())?;
/// let mut summary = NormStatistics::default();
/// for _ in 0..10 {
///     let loss = w.sqr()?.sum_all()?;
///     summary.add(&opt.backward_step_report(&loss)?)?;
/// }
/// assert_eq!(summary.steps(), 10);
/// assert_eq!(summary.clipped_fraction(), 0.0);
/// for suggestion in summary.suggest_max_norm() {
///     println!("{suggestion}");
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Default)]
pub struct NormStatistics {
    /// Finite norms before clipping, one per step.
    total_norms: Vec<f64>,
    clipped: u64,
    skipped: u64,
    non_finite: u64,
}

/// A limit, and the fraction of the recorded steps that it would clip, from
/// [`NormStatistics::suggest_max_norm`].
///
/// ```
#[doc = include_str!("norm_statistics_example.md")]
/// for norm in [1.0, 2.0, 4.0, 8.0] {
///     summary.add(&opt.backward_step_report(&(w.as_tensor() * norm)?)?)?;
/// }
/// let suggestions = summary.suggest_max_norm(); // percentiles 50, 75, 90, 95, 99
/// assert_eq!((suggestions[0].percentile, suggestions[0].max_norm), (50.0, 3.0));
/// assert_eq!(suggestions[0].to_string(), "p50: max_norm 3.000e0 would clip 50 % of the steps");
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct MaxNormSuggestion {
    /// Percentile of the norms, 0 to 100.
    pub percentile: f64,
    /// The norm at this percentile.
    pub max_norm: f64,
    /// Fraction of the steps with a finite norm whose norm is above `max_norm`.
    pub clipped_fraction: f64,
}

impl std::fmt::Display for MaxNormSuggestion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (max_norm, percent) = (self.max_norm, 100.0 * self.clipped_fraction);
        write!(
            f,
            "p{}: max_norm {max_norm:.3e} would clip {percent:.0} % of the steps",
            self.percentile
        )
    }
}

impl NormStatistics {
    /// Adds a step.
    ///
    /// ```
    #[doc = include_str!("norm_statistics_example.md")]
    /// let report = opt.backward_step_report(&w.sqr()?)?;
    /// summary.add(&report)?;
    /// assert_eq!(summary.median_norm(), Some(report.total_norm()?));
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// If the report cannot be read from a GPU.
    pub fn add(&mut self, report: &StepReport) -> Result<()> {
        self.add_numbers(
            report.total_norm()?,
            report.was_clipped()?,
            report.skipped()?,
        );
        Ok(())
    }

    /// Adds a step by its numbers, for example from the log of an earlier run.
    ///
    /// ```
    /// let mut summary = candle_grad_clip::NormStatistics::default();
    /// for norm in [1.0, 2.0, 4.0, 8.0] {
    ///     summary.add_numbers(norm, norm > 5.0, false);
    /// }
    /// assert_eq!(summary.clipped_fraction(), 0.25);
    /// ```
    pub fn add_numbers(&mut self, total_norm: f64, was_clipped: bool, skipped: bool) {
        if total_norm.is_finite() {
            self.total_norms.push(total_norm);
        } else {
            self.non_finite += 1;
        }
        self.clipped += u64::from(was_clipped);
        self.skipped += u64::from(skipped);
    }

    /// Steps added.
    ///
    /// ```
    #[doc = include_str!("norm_statistics_example.md")]
    /// for norm in [1.0, f64::NAN, 2.0] {
    ///     summary.add(&opt.backward_step_report(&(w.as_tensor() * norm)?)?)?;
    /// }
    /// assert_eq!(summary.steps(), 3); // the skipped one too
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.total_norms.len() as u64 + self.non_finite
    }

    /// Steps that were skipped.
    ///
    /// ```
    #[doc = include_str!("norm_statistics_example.md")]
    /// for norm in [1.0, f64::NAN, 2.0] {
    ///     summary.add(&opt.backward_step_report(&(w.as_tensor() * norm)?)?)?;
    /// }
    /// assert_eq!(summary.skipped(), 1);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Steps whose norm was NaN or infinite, skipped or not. Median, percentiles and suggestions
    /// ignore them.
    ///
    /// ```
    #[doc = include_str!("norm_statistics_example.md")]
    /// for norm in [1.0, f64::NAN, f64::INFINITY, 2.0] {
    ///     summary.add(&opt.backward_step_report(&(w.as_tensor() * norm)?)?)?;
    /// }
    /// assert_eq!((summary.non_finite(), summary.steps()), (2, 4));
    /// assert_eq!(summary.median_norm(), Some(1.5));
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn non_finite(&self) -> u64 {
        self.non_finite
    }

    /// Fraction of all steps that were clipped; 0 for no steps.
    ///
    /// ```
    #[doc = include_str!("norm_statistics_example.md")]
    /// opt.set_clip(Clip::norm(5.0))?;
    /// for norm in [1.0, 2.0, 4.0, 8.0] {
    ///     summary.add(&opt.backward_step_report(&(w.as_tensor() * norm)?)?)?;
    /// }
    /// assert_eq!(summary.clipped_fraction(), 0.25);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn clipped_fraction(&self) -> f64 {
        if self.steps() == 0 {
            0.0
        } else {
            self.clipped as f64 / self.steps() as f64
        }
    }

    /// The median of the finite norms before clipping; `None` without any.
    ///
    /// ```
    #[doc = include_str!("norm_statistics_example.md")]
    /// for norm in [1.0, 2.0, 4.0, 8.0] {
    ///     summary.add(&opt.backward_step_report(&(w.as_tensor() * norm)?)?)?;
    /// }
    /// assert_eq!(summary.median_norm(), Some(3.0));
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn median_norm(&self) -> Option<f64> {
        self.percentile_norm(50.0)
    }

    /// A percentile (0 to 100) of the finite norms before clipping, with linear interpolation as in
    /// `numpy.percentile`. `None` without a finite norm, or for an invalid percentile.
    ///
    /// ```
    #[doc = include_str!("norm_statistics_example.md")]
    /// for norm in [1.0, 2.0, 4.0, 8.0] {
    ///     summary.add(&opt.backward_step_report(&(w.as_tensor() * norm)?)?)?;
    /// }
    /// assert_eq!(summary.percentile_norm(25.0), Some(1.75));
    /// assert_eq!(summary.percentile_norm(101.0), None);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn percentile_norm(&self, percentile: f64) -> Option<f64> {
        percentile_of(&self.sorted(), percentile)
    }

    /// Suggests limits: percentiles 50, 75, 90, 95 and 99 of the norms, each with the fraction of
    /// steps that it would have clipped. Percentiles whose norm is 0 are left out. Without a finite
    /// norm there are no suggestions.
    ///
    /// The suggestions are best if the recorded steps were not clipped and used a safe learning
    /// rate. A limit that clips nearly every step only rescales the learning rate.
    ///
    /// ```
    #[doc = include_str!("norm_statistics_example.md")]
    /// for norm in [1.0, 2.0, 4.0, 8.0] {
    ///     summary.add(&opt.backward_step_report(&(w.as_tensor() * norm)?)?)?;
    /// }
    /// for suggestion in summary.suggest_max_norm() {
    ///     println!("{suggestion}"); // "p75: max_norm 5.000e0 would clip 25 % of the steps"
    /// }
    /// assert_eq!(summary.suggest_max_norm()[1].clipped_fraction, 0.25);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn suggest_max_norm(&self) -> Vec<MaxNormSuggestion> {
        let sorted = self.sorted();
        let suggestion = |percentile| {
            let max_norm = percentile_of(&sorted, percentile).filter(|norm| *norm > 0.0)?;
            let above = sorted.len() - sorted.partition_point(|norm| *norm <= max_norm);
            let clipped_fraction = above as f64 / sorted.len() as f64;
            Some(MaxNormSuggestion {
                percentile,
                max_norm,
                clipped_fraction,
            })
        };
        [50.0, 75.0, 90.0, 95.0, 99.0]
            .into_iter()
            .filter_map(suggestion)
            .collect()
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.total_norms.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

fn percentile_of(sorted: &[f64], percentile: f64) -> Option<f64> {
    if !(0.0..=100.0).contains(&percentile) {
        return None;
    }
    let position = percentile / 100.0 * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (
        sorted[position.floor() as usize],
        sorted[position.ceil() as usize],
    );
    Some(low + (high - low) * position.fract())
}

#[cfg(test)]
mod tests {
    use super::percentile_of;

    #[test]
    fn percentiles_equal_those_of_numpy() {
        // numpy.percentile([1, 2, 4, 8], [0, 25, 50, 90, 100])
        let norms = [1.0, 2.0, 4.0, 8.0];
        for (percentile, right) in [
            (0.0, 1.0),
            (25.0, 1.75),
            (50.0, 3.0),
            (90.0, 6.8),
            (100.0, 8.0),
        ] {
            let ours = percentile_of(&norms, percentile).unwrap_or(f64::NAN);
            assert!((ours - right).abs() < 1e-12, "{percentile}: {ours}");
        }
        assert_eq!(percentile_of(&[], 50.0), None);
        assert_eq!(percentile_of(&norms, f64::NAN), None);
        assert_eq!(percentile_of(&norms, 101.0), None);
    }
}
