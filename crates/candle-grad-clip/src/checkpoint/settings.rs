//! What a checkpoint says of an optimizer beside the state of its Vars.

use candle_nn::ParamsAdamW;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::optim::{self, ParamsSgd};
use crate::param_state::Kept;

/// The kind of optimizer, and its hyper-parameters.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Settings {
    AdamW(AdamWSettings),
    Sgd(SgdSettings),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AdamWSettings {
    #[serde(with = "ParamsAdamWRecord")]
    pub(crate) params: ParamsAdamW,
    pub(crate) amsgrad: bool,
    pub(crate) master_weights: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SgdSettings {
    #[serde(with = "ParamsSgdRecord")]
    pub(crate) params: ParamsSgd,
    pub(crate) master_weights: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "ParamsAdamW", deny_unknown_fields)]
struct ParamsAdamWRecord {
    #[serde(with = "crate::serde_float")]
    lr: f64,
    #[serde(with = "crate::serde_float")]
    beta1: f64,
    #[serde(with = "crate::serde_float")]
    beta2: f64,
    #[serde(with = "crate::serde_float")]
    eps: f64,
    #[serde(with = "crate::serde_float")]
    weight_decay: f64,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "ParamsSgd", deny_unknown_fields)]
struct ParamsSgdRecord {
    #[serde(with = "crate::serde_float")]
    lr: f64,
    #[serde(with = "crate::serde_float")]
    momentum: f64,
    #[serde(with = "crate::serde_float")]
    dampening: f64,
    #[serde(with = "crate::serde_float")]
    weight_decay: f64,
    nesterov: bool,
}

impl Settings {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "AdamW",
            Self::Sgd(_) => "Sgd",
        }
    }

    /// Hyper-parameters in their ranges, as the constructors check them.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Self::AdamW(adamw) => optim::check_adamw(&adamw.params),
            Self::Sgd(sgd) => optim::check_sgd(&sgd.params),
        }
    }

    /// Which arrays the optimizer keeps.
    pub(crate) fn kept(&self) -> Kept {
        match *self {
            Self::AdamW(AdamWSettings {
                amsgrad,
                master_weights,
                ..
            }) => Kept::adamw(amsgrad, master_weights),
            Self::Sgd(SgdSettings {
                params,
                master_weights,
            }) => Kept::sgd(params.momentum, master_weights),
        }
    }

    /// The names of the arrays of moments, in the order in which they are kept.
    pub(super) fn moments(&self) -> &'static [&'static str] {
        let all: &[&str] = match self {
            Self::AdamW(_) => &["first_moment", "second_moment", "max_second_moment"],
            Self::Sgd(_) => &["momentum_buffer"],
        };
        &all[..self.kept().moments.min(all.len())]
    }

    /// What [`load`](super::load) does not change, by name: it must be in the file as it is here.
    pub(super) fn fixed(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::AdamW(adamw) => vec![
                ("amsgrad", adamw.amsgrad.to_string()),
                ("master_weights", adamw.master_weights.to_string()),
            ],
            Self::Sgd(sgd) => vec![("master_weights", sgd.master_weights.to_string())],
        }
    }
}
