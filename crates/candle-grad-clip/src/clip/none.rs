//! No rule: gradients are measured and reported, but not changed.

use std::fmt;

use super::decision::{Decision, Given};
use super::options::{Options, Writer};
use super::rule::{Method, Rule, Scope};
use crate::error::Result;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NoClip;

impl Method for NoClip {
    fn parse(_: &mut Options<'_>) -> Result<Self> {
        Ok(Self)
    }

    fn write(&self, _: &mut Writer<'_, '_>) -> fmt::Result {
        Ok(())
    }

    fn check(&self, _: f64) -> Result<()> {
        Ok(())
    }

    fn scope(&self) -> Scope {
        Scope::Nothing
    }

    fn start(&self) -> Box<dyn Rule> {
        Box::new(*self)
    }

    fn device_max_norm(&self) -> Option<f64> {
        Some(f64::INFINITY)
    }
}

impl Rule for NoClip {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        Decision::scale(given, 1.0)
    }
}
