//! Rules that users write, in the wrapper.

use candle_nn::Optimizer;

use super::ClippedOptimizer;
#[cfg(doc)]
use crate::clip::Clip;
use crate::clip::ClipRule;
use crate::error::Result;

impl<O: Optimizer + 'static> ClippedOptimizer<O> {
    /// Lets a rule of your own decide, in front of the inner optimizer as any [`Clip`] is. The wrapper's `Clip` must be
    /// [`Clip::none`], whose [`norm_type`](Clip::norm_type), [`non_finite`](Clip::non_finite) and
    /// [`max_skips`](Clip::max_skips) hold; groups may have limits of their own. There is an example at [`ClipRule`].
    ///
    /// A checkpoint has what [`ClipRule::save`] returns: give the rule to the wrapper before it loads one.
    ///
    /// # Errors
    /// A clip that is not `Clip::none()`.
    pub fn with_rule(mut self, rule: impl ClipRule + 'static) -> Result<Self> {
        self.policy.set_rule(rule)?;
        Ok(self)
    }
}
