//! Clip by global norm: `clip_coef = min(1, max_norm / (total_norm + eps))`.
//!
//! Pascanu, Mikolov, Bengio (2013), "On the difficulty of training recurrent neural networks",
//! algorithm 1; `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15), which added eps.

use std::fmt;

use super::decision::{Decision, Given};
use super::options::{Options, Writer};
use super::rule::{Limit, LimitKind, Method, Rule};
use crate::check::check_limit;
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Norm {
    pub(super) max_norm: f64,
}

impl Method for Norm {
    fn parse(options: &mut Options<'_>) -> Result<Self> {
        let max_norm = options.main("max_norm")?;
        Ok(Self { max_norm })
    }

    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        out.main(self.max_norm)
    }

    fn check(&self, _: f64) -> Result<()> {
        check_limit("max_norm", self.max_norm)
    }

    fn start(&self) -> Box<dyn Rule> {
        Box::new(*self)
    }

    fn limit(&mut self) -> Option<Limit<'_>> {
        Some((LimitKind::MaxNorm, "max_norm", &mut self.max_norm))
    }

    fn device_max_norm(&self) -> Option<f64> {
        Some(self.max_norm)
    }
}

impl Rule for Norm {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        clip_to(self.max_norm, given)
    }

    fn set_limit(&mut self, value: f64) {
        self.max_norm = value;
    }
}

/// Clips the global norm. Rules that choose their limit use it too.
pub(super) fn clip_to(max_norm: f64, given: &Given<'_>) -> Decision {
    let coef = given.clip_coef(given.measured.total.stats, max_norm);
    Decision::scale(given, coef)
}

#[cfg(test)]
mod tests {
    use super::clip_to;
    use crate::clip::testing::{given, measured};

    #[test]
    fn the_norm_after_is_the_limit_and_clipping_again_changes_nothing() {
        let decision = clip_to(1.0, &given(&measured(&[&[3.0, 4.0]]).of(), 0.0));
        assert!((decision.clip_coef - 0.2).abs() < 1e-15);
        assert!((decision.clipped_norm - 1.0).abs() < 1e-15);
        let again = clip_to(1.0, &given(&measured(&[&[0.6, 0.8]]).of(), 0.0));
        assert!((again.clip_coef - 1.0).abs() < 1e-15);
    }

    #[test]
    fn a_norm_that_f64_cannot_hold_is_clipped_all_the_same() {
        let measured = measured(&[&[f64::MAX; 9]]);
        let decision = clip_to(6.0, &given(&measured.of(), 1e-6));
        assert!((decision.clipped_norm - 6.0).abs() < 1e-12, "{decision:?}");
    }

    #[test]
    fn an_infinite_limit_never_writes() {
        for values in [[0.0, 1.0], [f64::INFINITY, 1.0], [f64::NAN, 1.0]] {
            let measured = measured(&[&values]);
            let decision = clip_to(f64::INFINITY, &given(&measured.of(), 1e-6));
            assert!(!decision.was_clipped);
        }
    }
}
