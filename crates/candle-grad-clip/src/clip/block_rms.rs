//! Clip by the root mean square of each Var: `g_i * min(1, max_rms / (rms_i + eps))`, with
//! `rms_i = (sum |g|^p / n_i)^(1/p)` over its `n_i` elements.
//!
//! `optax.clip_by_block_rms` (optax 0.2.8), which has no eps. Adafactor (Shazeer, Stern, 2018)
//! clips its updates in the same way.

use std::fmt;

use candle_grad_clip_kernels::NormType;

use super::decision::{Decision, Given};
use super::options::{Options, Writer};
use super::per_var;
use super::rule::{Limit, LimitKind, Method, Rule};
use crate::check::check_limit;
use crate::error::Result;
use crate::gradients::Entry;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct BlockRms {
    pub(super) max_rms: f64,
}

impl Method for BlockRms {
    fn parse(options: &mut Options<'_>) -> Result<Self> {
        let max_rms = options.main("max_rms")?;
        Ok(Self { max_rms })
    }

    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        out.main(self.max_rms)
    }

    fn default_eps(&self) -> f64 {
        0.0
    }

    fn check(&self, _: f64) -> Result<()> {
        check_limit("max_rms", self.max_rms)
    }

    fn start(&self) -> Box<dyn Rule> {
        Box::new(*self)
    }

    fn limit(&mut self) -> Option<Limit<'_>> {
        Some((LimitKind::Other, "max_rms", &mut self.max_rms))
    }
}

impl Rule for BlockRms {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        // rms = norm / root, so the limit of the norm is max_rms * root.
        let root = |elements: f64| match given.measured.norm_type {
            NormType::L1 => elements,
            NormType::L2 => elements.sqrt(),
            NormType::Inf => 1.0,
            NormType::P(p) => elements.powf(p.recip()),
        };
        let limit = |entry: &Entry<'_>| {
            let root = root(entry.elements.max(1) as f64);
            (self.max_rms * root, given.eps * root)
        };
        per_var::clip_to(limit, given)
    }

    fn set_limit(&mut self, value: f64) {
        self.max_rms = value;
    }
}

#[cfg(test)]
mod tests {
    use super::{BlockRms, Rule};
    use crate::clip::testing::{given, measured};

    #[test]
    fn the_limit_is_that_of_the_mean_square() {
        // rms sqrt(25 / 4) = 2.5 and 0.5.
        let measured = measured(&[&[3.0, 4.0, 0.0, 0.0], &[0.5]]);
        let decide = |eps| BlockRms { max_rms: 1.0 }.decide(&given(&measured.of(), eps));
        let decision = decide(0.0);
        assert!((decision.clip_coef - 0.4).abs() < 1e-15);
        assert!((decision.clipped_norm - 4.25f64.sqrt()).abs() < 1e-15);
        // 1 / (2.5 + 0.5)
        assert!((decide(0.5).clip_coef - 1.0 / 3.0).abs() < 1e-15);
    }
}
