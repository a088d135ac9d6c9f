//! The arms of a comparison, as one text.

use std::str::FromStr;

use anyhow::{Result, bail};

use crate::arm::Arm;

/// Arms, separated by commas: `none,norm:1.0,zclip:z_thresh=2,warmup=50,auto`.
///
/// A rule's own options have commas between them as well, but no two readings: all options after a
/// rule's first are `option=value`, and no arm starts like that. So a part with `=`, and no colon
/// before it, belongs to the arm before it, and any other part starts an arm.
#[derive(Debug, Clone, PartialEq)]
pub struct Arms(pub Vec<Arm>);

impl Arms {
    /// What the story compares, and `compare` and `sweep` unless they are told.
    pub const STORY: &str = "none,norm:1.0,value:0.1";

    /// Puts several texts together.
    ///
    /// # Errors
    /// If one arm is there twice: both would write the same files.
    pub fn join(lists: &[Self]) -> Result<Vec<Arm>> {
        let mut all: Vec<Arm> = Vec::new();
        let folder = |arm: &Arm| arm.folder().to_lowercase(); // as Windows and macOS see it
        for arm in lists.iter().flat_map(|list| &list.0) {
            let same = |other: &&Arm| *other == arm || folder(other) == folder(arm);
            if let Some(other) = all.iter().find(same) {
                bail!("--clip has `{other}` and `{arm}`, which are the same: leave one out");
            }
            all.push(arm.clone());
        }
        Ok(all)
    }
}

impl FromStr for Arms {
    type Err = candle_grad_clip::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut arms: Vec<String> = Vec::new();
        for part in text.split(',') {
            match arms.last_mut() {
                Some(arm) if is_option(part) => {
                    arm.push(',');
                    arm.push_str(part);
                }
                _ => arms.push(part.to_owned()),
            }
        }
        let arms = arms.iter().map(|arm| arm.parse());
        Ok(Self(arms.collect::<Result<_, _>>()?))
    }
}

fn is_option(part: &str) -> bool {
    part.split('=')
        .next()
        .is_some_and(|key| key != part && !key.contains(':'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn texts(list: &str) -> Vec<String> {
        let arms: Arms = list.parse().unwrap();
        arms.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn options_stay_with_their_arm() {
        assert_eq!(texts("norm:1.0"), ["norm:1.0"]);
        assert_eq!(texts(Arms::STORY), ["none", "norm:1.0", "value:0.1"]);
        assert_eq!(
            texts(
                "none, zclip:z_thresh=2.5,warmup=25 ,norm:max_norm=1,eps=0,auto,auto:50,window=9,adagc"
            ),
            [
                "none",
                "zclip:z_thresh=2.5,warmup=25",
                "norm:max_norm=1,eps=0",
                "auto",
                "auto:50,window=9",
                "adagc"
            ]
        );
    }

    #[test]
    fn a_list_of_any_arms_is_read_back() {
        let arms = [
            "none",
            "none:non_finite=error",
            "norm:1",
            "norm:1,norm_type=inf",
            "value:0.1",
            "param-norm:1",
            "block-rms:max_rms=1,eps=1e-8",
            "auto:10",
            "quantile:0.9,rate=0.1",
            "zclip",
            "zclip:mode=mean,skip=true",
            "adagc:warmup=5",
            "agc:clipping=0.1,exclude=*.bias|head.*",
            "value:0.1+norm:1",
            "value:0.1,eps=0+zclip:z_thresh=2,warmup=3",
            "skip",
            "skip:norm=5",
            "skip:z=3,max_norm=1,max_skips=2",
        ];
        for first in arms {
            for second in arms {
                for third in ["skip:norm=5,z=3", "adagc"] {
                    assert_eq!(
                        texts(&format!("{first},{second},{third}")),
                        [first, second, third]
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_no_list_of_arms_is_refused() {
        for wrong in [
            "",
            ",",
            "norm:1,",
            ",norm:1",
            "norm:1,,auto",
            "warmup=3",
            "none,2",
            "norm:1,zlcip",
            "auto=1",
        ] {
            assert!(wrong.parse::<Arms>().is_err(), "{wrong}");
        }
        let error = "norm:1,window=3".parse::<Arms>().unwrap_err().to_string();
        assert!(error.contains("`norm` has no option `window`"), "{error}");
    }

    #[test]
    fn an_arm_given_twice_is_refused() {
        let list = |text: &str| text.parse::<Arms>().unwrap();
        assert_eq!(
            Arms::join(&[list("none,auto"), list("adagc")])
                .unwrap()
                .len(),
            3
        );
        for [first, second] in [
            ["norm:1,norm:1.0", "auto"],
            ["norm:1", "auto,norm:1."],
            ["auto", "auto:10"],
        ] {
            let error = Arms::join(&[list(first), list(second)])
                .unwrap_err()
                .to_string();
            assert!(error.contains("the same"), "{error}");
        }
    }
}
