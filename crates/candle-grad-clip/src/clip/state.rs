//! What a rule remembers of earlier steps. It is apart from [`Clip`], which stays plain data.

use super::{Clip, Method, Own, adagc, auto, quantile, skip, zclip};

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
    /// A norm of all gradients that is beyond all measure, and the limit that it was given.
    Beyond { norm: f64, limit: f64 },
    /// A norm of each Var's gradient, of those that have one.
    ParamNorms(Vec<Option<f64>>),
    /// What a rule that may skip steps asks for.
    Skip {
        norm: Option<f64>,
        loss: Option<f64>,
    },
    /// What the user's rule gets.
    Own(Box<Own>),
    /// What each of several rules adds.
    Each(Vec<Observed>),
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
        match (&self.rules[..], observed) {
            (rules, Observed::Each(each)) => {
                for (rule, observed) in rules.iter().zip(each) {
                    rule.method.observe(state, observed);
                }
            }
            ([rule], observed) => rule.method.observe(state, observed),
            _ => {}
        }
    }

    /// Makes the history of a clip before this one its own: kept for methods that both have, empty for others.
    pub(crate) fn adapt(&self, state: &mut RuleState) {
        let mut before = std::mem::take(state);
        for rule in &self.rules {
            match &rule.method {
                Method::Auto(rule) => {
                    before.auto.adapt(rule.kept());
                    state.auto = std::mem::take(&mut before.auto);
                }
                Method::Skip(rule) => {
                    before.skip.adapt(rule.window);
                    state.skip = std::mem::take(&mut before.skip);
                }
                Method::ZClip(_) => {
                    before.zclip.adapt();
                    state.zclip = std::mem::take(&mut before.zclip);
                }
                Method::AdaGc(_) => {
                    before.adagc.adapt();
                    state.adagc = std::mem::take(&mut before.adagc);
                }
                Method::Quantile(_) => state.quantile = before.quantile,
                _ => {}
            }
        }
    }
}

impl Method {
    fn observe(&self, state: &mut RuleState, observed: &Observed) {
        match (self, observed) {
            (Self::Auto(rule), Observed::Norm(norm)) => {
                state.auto.push(*norm, Some(rule.kept()));
            }
            (Self::ZClip(rule), Observed::Norm(norm)) => rule.observe(&mut state.zclip, *norm),
            (Self::ZClip(rule), Observed::Beyond { norm, limit }) => {
                rule.observe_beyond(&mut state.zclip, *norm, *limit);
            }
            (Self::Quantile(rule), Observed::Norm(norm)) => {
                rule.observe(&mut state.quantile, *norm);
            }
            (Self::Skip(rule), Observed::Skip { norm, loss }) => {
                rule.observe(&mut state.skip, *norm, *loss);
            }
            (Self::AdaGc(rule), Observed::ParamNorms(norms)) => {
                rule.observe(&mut state.adagc, norms);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{RuleState, adagc, auto, quantile, skip, zclip};
    use crate::clip::Clip;

    /// Of a file, say, that an earlier version wrote.
    #[test]
    fn zeros_of_an_older_history_are_forgotten() -> crate::Result<()> {
        let zeros = || RuleState {
            auto: auto::History::new(vec![0.0, 3.0, 0.0, 2.0]),
            zclip: zclip::State {
                warmup: vec![0.0, 1.0],
                statistics: Some(zclip::Statistics {
                    mean: 0.0,
                    variance: 0.0,
                }),
            },
            adagc: adagc::State {
                means: vec![Some(0.0), Some(2.0), None],
                steps: 7,
            },
            quantile: quantile::State {
                max_norm: Some(2.0),
            },
            skip: skip::Window {
                norms: vec![0.0, 4.0].into(),
                losses: vec![0.0, 1.0].into(),
            },
        };
        let mut state = zeros();
        let clip: Clip = "auto+quantile+zclip+adagc+skip:z=6".parse()?;
        clip.adapt(&mut state);
        let right = RuleState {
            auto: auto::History::new(vec![3.0, 2.0]),
            zclip: zclip::State {
                warmup: vec![1.0],
                statistics: None,
            },
            adagc: adagc::State {
                means: vec![None, Some(2.0), None],
                steps: 7,
            },
            skip: skip::Window {
                norms: vec![4.0].into(),
                losses: vec![0.0, 1.0].into(), // losses may be 0
            },
            ..zeros()
        };
        assert_eq!(state, right);
        Ok(())
    }
}
