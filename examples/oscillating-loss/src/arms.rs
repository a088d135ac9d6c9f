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
