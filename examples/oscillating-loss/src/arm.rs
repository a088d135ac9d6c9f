//! An arm of a comparison: what is done to the gradients.

use std::fmt;
use std::str::FromStr;

use candle_grad_clip::{Clip, Error, NonFinite};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The limit of the story's arm that clips the norm.
pub const MAX_NORM: f64 = 1.0;

/// A [`Clip`] under the name that it was given, which is its text: `norm:1.0`,
/// `zclip:z_thresh=2,warmup=50`.
///
/// `none` is no protection at all: NaN gradients reach the weights too.
#[derive(Debug, Clone)]
pub struct Arm {
    text: String,
    clip: Clip,
}

impl Arm {
    /// Whether this arm is `none`: it leaves gradients as they are.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.method() == "none" && !self.text.contains('+')
    }

    /// The rule's name: `norm`, `zclip`; of several, the first's.
    #[must_use]
    pub fn method(&self) -> &str {
        self.text.split(':').next().unwrap_or_default()
    }

    /// The limit of an arm that clips the norm to one.
    #[must_use]
    pub fn max_norm(&self) -> Option<f64> {
        let (_, options) = self.text.split_once(':')?;
        let limit = |option: &str| match option.split_once('=') {
            None => option.parse().ok(),
            Some(("max_norm", limit)) => limit.parse().ok(),
            Some(_) => None,
        };
        options
            .split(',')
            .find_map(limit)
            .filter(|_| self.method() == "norm")
    }

    /// What the wrapper is told; `non_finite` is for arms that clip and whose text doesn't say it.
    ///
    /// The wrapper protects from NaN even when it only measures (it skips such a step), so the arm
    /// without protection has to ask for `Propagate`.
    #[must_use]
    pub fn clip(&self, non_finite: NonFinite) -> Clip {
        let clip = self.clip.clone();
        if self.text.contains("non_finite=") {
            clip
        } else if self.is_none() {
            clip.non_finite(NonFinite::Propagate)
        } else {
            clip.non_finite(non_finite)
        }
    }

    /// A folder name for this arm, without what Windows doesn't allow: colons, `|`, `*`, a dot at
    /// the end.
    #[must_use]
    pub fn folder(&self) -> String {
        let forbidden = |c: char| c.is_control() || r#"<>:"/\|?*"#.contains(c);
        let name = self.text.replace(forbidden, "-");
        name.trim_end_matches('.').to_owned()
    }
}

/// Two arms are the same if they do the same, however that was written.
impl PartialEq for Arm {
    fn eq(&self, other: &Self) -> bool {
        let clips = |arm: &Self| [NonFinite::Error, NonFinite::Zero].map(|policy| arm.clip(policy));
        clips(self) == clips(other)
    }
}

impl From<Clip> for Arm {
    fn from(clip: Clip) -> Self {
        Self {
            text: clip.to_string(),
            clip,
        }
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl FromStr for Arm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let text: String = text.split_whitespace().collect();
        let clip = text.parse()?;
        Ok(Self { text, clip })
    }
}

impl Serialize for Arm {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Arm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}
