//! What a rule remembers of earlier steps. It is apart from [`Clip`], which stays plain data.

use super::{Clip, Method, adagc, auto, quantile, skip, zclip};

/// The histories of all rules: that of the wrapper's own may have something in it, the others are empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct RuleState {
    pub(super) auto: auto::History,
    pub(super) zclip: zclip::State,
    pub(super) adagc: adagc::State,
    pub(super) quantile: quantile::State,
    pub(super) skip: skip::Window,
}

/// What a step adds to the history. Never a number that is not finite.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) enum Observed {
    #[default]
    Nothing,
    /// A norm of all gradients.
    Norm(f64),
    /// A norm of each Var's gradient, of those that have one.
    ParamNorms(Vec<Option<f64>>),
}

impl Observed {
    /// Of a norm that may not be finite.
    pub(super) fn norm(norm: Option<f64>) -> Self {
        norm.map_or(Self::Nothing, Self::Norm)
    }
}

impl Clip {
    /// A step was taken as decided.
    pub(crate) fn observe(&self, state: &mut RuleState, observed: &Observed) {
        match (&self.method, observed) {
            (Method::Auto(rule), Observed::Norm(norm)) => state.auto.push(*norm, rule.window),
            (Method::ZClip(rule), Observed::Norm(norm)) => rule.observe(&mut state.zclip, *norm),
            (Method::Quantile(rule), Observed::Norm(norm)) => {
                rule.observe(&mut state.quantile, *norm);
            }
            (Method::Skip(rule), Observed::Norm(norm)) => rule.observe(&mut state.skip, *norm),
            (Method::AdaGc(rule), Observed::ParamNorms(norms)) => {
                rule.observe(&mut state.adagc, norms);
            }
            _ => {}
        }
    }

    /// Makes the history of a clip before this one its own: kept for the same method, empty for another.
    pub(crate) fn adapt(&self, state: &mut RuleState, before: &Clip) {
        if std::mem::discriminant(&self.method) != std::mem::discriminant(&before.method) {
            *state = RuleState::default();
        }
        match &self.method {
            Method::Auto(rule) => state.auto.shorten(rule.window),
            Method::Skip(rule) => state.skip.shorten(rule.window),
            _ => {}
        }
    }
}
