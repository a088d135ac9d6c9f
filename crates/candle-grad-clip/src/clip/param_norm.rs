//! Clip by the norm of each Var: `g_i * min(1, max_norm / (param_norm_i + eps))`.
//!
//! Keras' `clipnorm` (3.10), burn's `GradientClipping::Norm`; `optax.clip_by_block_rms` without the
//! mean.

use std::fmt;

use super::decision::{Decision, Given};
use super::options::{Options, Writer};
use super::per_var;
use super::rule::{Limit, LimitKind, Method, Rule};
use crate::check::check_limit;
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ParamNorm {
    pub(super) max_norm: f64,
}

impl Method for ParamNorm {
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
}

impl Rule for ParamNorm {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        per_var::clip_to(|_| (self.max_norm, given.eps), given)
    }

    fn set_limit(&mut self, value: f64) {
        self.max_norm = value;
    }
}

#[cfg(test)]
mod tests {
    use super::{ParamNorm, Rule};
    use crate::clip::testing::{given, measured};

    #[test]
    fn each_var_has_its_own_limit() {
        // Norms 5 and 0.5: only the first is above 1.
        let measured = measured(&[&[3.0, 4.0], &[0.3, 0.4]]);
        let decide = |max_norm| ParamNorm { max_norm }.decide(&given(&measured.of(), 0.0));
        let decision = decide(1.0);
        assert!((decision.clip_coef - 0.2).abs() < 1e-15);
        assert!((decision.clipped_norm - 1.25f64.sqrt()).abs() < 1e-15);
        assert!(!decide(5.0).was_clipped);
    }
}
