//! Rules that users write, in the wrapper.

use std::path::Path;

use candle_nn::Optimizer;

use super::ClippedOptimizer;
use crate::Measured;
use crate::clip::{Clip, ClipRule, NonFinite, Observed, Own};
use crate::error::{Error, Result};
use crate::gradients::Measurements;

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
        check_none(&self.clip)?;
        self.own = Some(Box::new(rule));
        Ok(self)
    }

    /// What the user's rule decides, if there is one and the policy lets it.
    pub(super) fn ask_own_rule(&self, measured: &Measurements<'_>) -> Result<Option<Own>> {
        let Some(rule) = &self.own else {
            return Ok(None);
        };
        let bad = measured.total.stats.non_finite() > 0;
        let policy = self.clip.non_finite;
        let refused = matches!(policy, NonFinite::Error | NonFinite::SkipStep);
        if bad && (refused || self.loss_scale() > 1.0) {
            return Ok(None);
        }
        let names = self.vars.shared_names().clone();
        let view = Measured::new(measured, policy, names, self.step + 1);
        let decision = rule.decide(&view);
        decision.check(measured.entries.len())?;
        if let Some(value) = decision.bound()
            && self.limits.groups().has_limits()
        {
            return Err(Error::InvalidOption {
                name: "the bound of the ClipRule",
                value,
                expected: "no Clamp beside groups that have a max_norm",
            });
        }
        Ok(Some(Own {
            measured: view,
            decision,
        }))
    }

    /// The step was taken.
    pub(super) fn observe_own_rule(&mut self, observed: &Observed) {
        if let (Some(rule), Observed::Own(own)) = (&mut self.own, observed) {
            rule.observe(&own.measured, &own.decision);
        }
    }
}

/// The clip beside a rule of the user's.
pub(super) fn check_none(clip: &Clip) -> Result<()> {
    if clip.is_none() {
        return Ok(());
    }
    Err(Error::InvalidClip {
        text: clip.to_string(),
        reason: "a ClipRule decides here, expected none (which may have norm_type, non_finite and max_skips)"
            .to_string(),
    })
}

/// Gives the user's rule what a checkpoint has of it; the last of what can fail when one is loaded.
pub(crate) fn load(
    rule: Option<&mut Box<dyn ClipRule>>,
    clip: &Clip,
    state: &[f64],
    path: &Path,
) -> Result<()> {
    let fault = |reason: String| Error::Checkpoint {
        path: path.to_path_buf(),
        reason,
    };
    match rule {
        Some(rule) => {
            check_none(clip)?;
            if state.is_empty() {
                return Ok(());
            }
            let loaded = rule.load(state);
            loaded.map_err(|reason| fault(format!("its ClipRule's state: {reason}")))
        }
        None if state.is_empty() => Ok(()),
        None => Err(fault(
            "it has the state of a ClipRule, expected a wrapper that was given one by with_rule"
                .to_string(),
        )),
    }
}
