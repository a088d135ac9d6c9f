//! A limit that is a function of the step.

use candle_nn::Optimizer;

#[cfg(doc)]
use crate::Clip;

use super::ClippedOptimizer;
use crate::error::Result;

/// `limit(step)`.
pub(super) struct Schedule(Box<dyn Fn(u64) -> f64 + Send + Sync>);

impl<O: Optimizer + 'static> ClippedOptimizer<O> {
    /// Takes the limit of each step from a function of the step's number, which counts from 1 and includes skipped steps: the number in
    /// the report, not [`steps_taken`](Self::steps_taken).
    ///
    /// It is the `max_norm` of [`Clip::norm`] or [`Clip::param_norm`]; in a clip without these that of [`ZClip`](crate::ZClip) or
    /// [`SkipSteps`](crate::SkipSteps); without those the limit of [`Clip::value`] or [`Clip::block_rms`]. [`clip`](Self::clip) shows the limit of the latest step.
    /// A checkpoint has the step's number, not the function: a resumed run gives it again, and goes on where it was.
    ///
    /// The function is called once in every call that takes a step, skips it or fails. A step that has failed is tried again with
    /// the same number.
    ///
    /// A linear warm-up, from 0.1 to 1 in 1000 steps:
    ///
    /// ```
    #[doc = include_str!("../step_example.md")]
    /// let warm_up = |step: u64| 0.1 + 0.9 * (step as f64 / 1000.0).min(1.0);
    /// let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?.with_max_norm_schedule(warm_up)?;
    /// let report = opt.backward_step_report(&loss)?; // norm 5, step 1
    /// assert!((report.clipped_norm()? - 0.1009).abs() < 1e-6);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// A clip without a limit, or with two that it could be. A function that returns 0, less or NaN makes its step an error,
    /// which changes nothing.
    pub fn with_max_norm_schedule(
        mut self,
        max_norm: impl Fn(u64) -> f64 + Send + Sync + 'static,
    ) -> Result<Self> {
        self.policy.expect_schedule()?;
        self.schedule = Some(Schedule(Box::new(max_norm)));
        Ok(self)
    }

    /// Sets the limit of the next step.
    pub(super) fn schedule(&mut self) -> Result<()> {
        if let Some(Schedule(limit)) = &self.schedule {
            self.policy.set_limit(limit(self.step + 1))?;
        }
        Ok(())
    }
}
