//! An arm of a comparison: what is done to the gradients.

use std::fmt;
use std::str::FromStr;

use anyhow::{Error, Result, bail};
use candle_grad_clip::{Clip, NonFinite};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The limit of the story's arm that clips the norm.
pub const MAX_NORM: f64 = 1.0;

/// `none`, `norm:MAX_NORM` or `value:CLIP_VALUE`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arm {
    /// No protection at all: NaN gradients reach the weights too.
    None,
    /// Scales all gradients together, to a global norm of at most this.
    Norm(f64),
    /// Cuts each element to at most this magnitude.
    Value(f64),
}

impl Arm {
    /// The arms that the story compares.
    pub const STORY: [Self; 3] = [Self::None, Self::Norm(MAX_NORM), Self::Value(0.1)];

    /// What the wrapper is told; `non_finite` is for the arms that clip.
    ///
    /// The wrapper protects from NaN even when it only measures (it skips such a step), so the arm
    /// without protection has to ask for `Propagate`.
    #[must_use]
    pub fn clip(self, non_finite: NonFinite) -> Clip {
        match self {
            Self::None => Clip::none().non_finite(NonFinite::Propagate),
            Self::Norm(max_norm) => Clip::norm(max_norm).non_finite(non_finite),
            Self::Value(clip_value) => Clip::value(clip_value).non_finite(non_finite),
        }
    }

    /// A folder name for this arm: no colon, which Windows doesn't allow.
    #[must_use]
    pub fn folder(self) -> String {
        self.to_string().replace(':', "-")
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.pad("none"),
            Self::Norm(max_norm) => f.pad(&format!("norm:{max_norm:?}")),
            Self::Value(clip_value) => f.pad(&format!("value:{clip_value:?}")),
        }
    }
}

impl FromStr for Arm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let limit = |limit: &str| match limit.parse::<f64>() {
            Ok(limit) if limit > 0.0 => Ok(limit),
            _ => bail!("expected a limit above 0, found `{limit}`"),
        };
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            Some(("norm", max_norm)) => Ok(Self::Norm(limit(max_norm)?)),
            Some(("value", clip_value)) => Ok(Self::Value(limit(clip_value)?)),
            _ => bail!("expected `none`, `norm:MAX_NORM` or `value:CLIP_VALUE`"),
        }
    }
}

impl Serialize for Arm {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Arm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}
