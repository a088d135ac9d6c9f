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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn arm(text: &str) -> Arm {
        text.parse().unwrap()
    }

    #[test]
    fn an_arm_is_called_what_it_was_given_as() {
        for text in [
            "none",
            "norm:1.0",
            "zclip:z_thresh=2.0,warmup=50",
            "auto",
            "value:1+norm:2",
        ] {
            assert_eq!(arm(text).to_string(), text);
            assert_eq!(arm(text).clip(NonFinite::SkipStep), clip(text));
        }
        assert_eq!(arm(" zclip: z_thresh = 2 ").to_string(), "zclip:z_thresh=2");
        assert_eq!(Arm::from(Clip::norm(0.5)).to_string(), "norm:0.5");
    }

    fn clip(text: &str) -> Clip {
        let clip: Clip = text.parse().unwrap();
        if text == "none" {
            clip.non_finite(NonFinite::Propagate)
        } else {
            clip
        }
    }

    #[test]
    fn what_does_the_same_is_the_same() {
        assert_eq!(arm("norm:1.0"), arm("norm:max_norm=1"));
        assert_eq!(arm("none"), Arm::from(Clip::none()));
        assert_ne!(arm("norm:1"), arm("norm:2"));
        assert_ne!(arm("none"), arm("none:non_finite=skip_step"));
        assert_ne!(arm("norm:1"), arm("norm:1,non_finite=skip_step"));
        assert!(arm("none:max_skips=3").is_none() && !arm("none+norm:1").is_none());
    }

    #[test]
    fn the_text_decides_on_nan_before_the_option_does() {
        let skip = NonFinite::SkipStep;
        let error = Clip::norm(1.0).non_finite(NonFinite::Error);
        assert_eq!(arm("norm:1,non_finite=error").clip(skip), error);
        assert_eq!(arm("norm:1").clip(NonFinite::Error), error);
        assert_eq!(arm("none:non_finite=skip_step").clip(skip), Clip::none());
        let unprotected = Clip::none().non_finite(NonFinite::Propagate);
        assert_eq!(arm("none").clip(NonFinite::Error), unprotected);
    }

    #[test]
    fn only_a_limit_of_the_norm_is_one() {
        assert_eq!(arm("norm:0.5,eps=0").max_norm(), Some(0.5));
        assert_eq!(arm("norm:eps=0,max_norm=2").max_norm(), Some(2.0));
        for other in ["none", "value:0.1", "zclip:max_norm=1", "param-norm:1"] {
            assert_eq!(arm(other).max_norm(), None, "{other}");
        }
    }

    #[test]
    fn folders_have_names_that_windows_allows() {
        assert_eq!(arm("norm:1.0").folder(), "norm-1.0");
        assert_eq!(arm("norm:1.").folder(), "norm-1");
        assert_eq!(
            arm("zclip:z_thresh=2,warmup=50").folder(),
            "zclip-z_thresh=2,warmup=50"
        );
        assert_eq!(
            arm("agc:exclude=*.bias|head.*").folder(),
            "agc-exclude=-.bias-head.-"
        );
        assert_eq!(arm("value:0.1+norm:1").folder(), "value-0.1+norm-1");
    }
}
