//! The limit of a clip that a schedule moves.

use super::{Clip, Method};
use crate::check::check_limit;
use crate::error::{Error, Result};

impl Clip {
    /// Sets the `max_norm`, or where there is none the one other limit.
    ///
    /// # Errors
    /// A limit that is not above 0; no limit to set, or more than one. Nothing is changed then.
    pub(crate) fn set_limit(&mut self, value: f64) -> Result<()> {
        let mut limits = Vec::new();
        for limit in [Method::max_norm, Method::side_max_norm, Method::other_limit] {
            limits = self
                .rules
                .iter_mut()
                .filter_map(|rule| limit(&mut rule.method))
                .collect();
            if !limits.is_empty() {
                break;
            }
        }
        if let [(name, limit)] = &mut limits[..] {
            check_limit(name, value)?;
            **limit = value;
            return Ok(());
        }
        let reason = match limits.len() {
            0 => "it has no limit that a schedule could set, expected one such as norm",
            _ => "it has more than one limit that a schedule could set, expected one",
        };
        Err(Error::InvalidClip {
            text: self.to_string(),
            reason: reason.to_string(),
        })
    }

    /// Whether there is one limit to schedule.
    pub(crate) fn check_schedule(&self) -> Result<()> {
        let mut finite = self.clone();
        finite.set_limit(1.0)?;
        finite.check()
    }
}

/// A limit, and its name.
type Limit<'a> = Option<(&'static str, &'a mut f64)>;

impl Method {
    fn max_norm(&mut self) -> Limit<'_> {
        match self {
            Self::Norm { max_norm } | Self::ParamNorm { max_norm } => Some(("max_norm", max_norm)),
            _ => None,
        }
    }

    /// Of a rule that does something else first.
    fn side_max_norm(&mut self) -> Limit<'_> {
        match self {
            Self::ZClip(rule) => Some(("max_norm", &mut rule.max_norm)),
            Self::Skip(rule) => Some(("max_norm", &mut rule.max_norm)),
            _ => None,
        }
    }

    fn other_limit(&mut self) -> Limit<'_> {
        match self {
            Self::Value { clip_value } => Some(("clip_value", clip_value)),
            Self::BlockRms { max_rms } => Some(("max_rms", max_rms)),
            _ => None,
        }
    }
}
