//! Hyper-parameters: their ranges, and how checkpoints hold them.

use candle_core::DType;
use candle_nn::ParamsAdamW;
use serde::{Deserialize, Serialize};

use crate::check::{check_decay, check_not_negative};
use crate::error::{Error, Result};
use crate::param_state::StateLayout;
use crate::vars::NamedVars;

/// Hyper-parameters of [`Sgd`](super::Sgd), with the names and meanings of `torch.optim.SGD`.
///
/// ```
/// use candle_grad_clip::optim::ParamsSgd;
///
/// assert_eq!(ParamsSgd::from(0.1), ParamsSgd { lr: 0.1, ..Default::default() });
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParamsSgd {
    /// Learning rate. Default: 1e-3, as in PyTorch.
    pub lr: f64,
    /// Decay of the momentum buffer. Default: 0, which means no momentum and no buffer.
    pub momentum: f64,
    /// The buffer adds `1 - dampening` times the gradient. 0 to 1 (PyTorch takes any number).
    /// Default: 0.
    pub dampening: f64,
    /// Weight decay, added to the (clipped) gradient. Default: 0.
    pub weight_decay: f64,
    /// Nesterov momentum; needs a momentum, and no dampening. Default: no.
    pub nesterov: bool,
}

impl Default for ParamsSgd {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            momentum: 0.0,
            dampening: 0.0,
            weight_decay: 0.0,
            nesterov: false,
        }
    }
}

/// Plain gradient descent with this learning rate, like the config of candle's SGD.
impl From<f64> for ParamsSgd {
    fn from(lr: f64) -> Self {
        Self {
            lr,
            ..Self::default()
        }
    }
}

/// The kind of optimizer, and its hyper-parameters.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Settings {
    AdamW(AdamWSettings),
    Sgd(SgdSettings),
    /// An optimizer of which only the learning rate is known.
    Other(OtherSettings),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OtherSettings {
    /// The type's name.
    pub(crate) name: String,
    #[serde(with = "crate::serde_float")]
    pub(crate) lr: f64,
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
    pub(crate) fn kind(&self) -> &str {
        match self {
            Self::AdamW(_) => "AdamW",
            Self::Sgd(_) => "Sgd",
            Self::Other(other) => &other.name,
        }
    }

    /// Checks the ranges of the hyper-parameters, like the constructors.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::AdamW(adamw) => check_adamw(&adamw.params),
            Self::Sgd(sgd) => check_sgd(&sgd.params),
            Self::Other(other) => check_not_negative("lr", other.lr),
        }
    }

    /// Which arrays the optimizer keeps.
    pub(crate) fn layout(&self) -> StateLayout {
        match *self {
            Self::AdamW(AdamWSettings {
                amsgrad,
                master_weights,
                ..
            }) => StateLayout::adamw(amsgrad, master_weights),
            Self::Sgd(SgdSettings {
                params,
                master_weights,
            }) => StateLayout::sgd(params.momentum, master_weights),
            Self::Other(_) => StateLayout::default(),
        }
    }

    /// The names of the arrays of moments, in the order in which they are kept.
    pub(crate) fn moments(&self) -> &'static [&'static str] {
        let all: &[&str] = match self {
            Self::AdamW(_) => &["first_moment", "second_moment", "max_second_moment"],
            Self::Sgd(_) => &["momentum_buffer"],
            Self::Other(_) => &[],
        };
        &all[..self.layout().moments.min(all.len())]
    }

    /// The options, by name, that must be the same in a checkpoint as here.
    pub(crate) fn fixed(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::AdamW(adamw) => vec![
                ("amsgrad", adamw.amsgrad.to_string()),
                ("master_weights", adamw.master_weights.to_string()),
            ],
            Self::Sgd(sgd) => vec![("master_weights", sgd.master_weights.to_string())],
            Self::Other(_) => Vec::new(),
        }
    }
}

/// Checks the ranges of AdamW's hyper-parameters.
pub(super) fn check_adamw(params: &ParamsAdamW) -> Result<()> {
    check_not_negative("lr", params.lr)?;
    check_decay("beta1", params.beta1)?;
    check_decay("beta2", params.beta2)?;
    check_not_negative("eps", params.eps)?;
    check_not_negative("weight_decay", params.weight_decay)
}

/// Checks the ranges of SGD's hyper-parameters.
pub(super) fn check_sgd(params: &ParamsSgd) -> Result<()> {
    check_not_negative("lr", params.lr)?;
    check_not_negative("momentum", params.momentum)?;
    check_not_negative("weight_decay", params.weight_decay)?;
    if !(0.0..=1.0).contains(&params.dampening) {
        return Err(Error::InvalidOption {
            name: "dampening",
            value: params.dampening,
            expected: "0 to 1: with more, momentum would climb",
        });
    }
    if params.nesterov && params.momentum == 0.0 {
        return Err(Error::InvalidOption {
            name: "momentum",
            value: params.momentum,
            expected: "a value above 0 for Nesterov momentum",
        });
    }
    if params.nesterov && params.dampening != 0.0 {
        return Err(Error::InvalidOption {
            name: "dampening",
            value: params.dampening,
            expected: "0 for Nesterov momentum",
        });
    }
    Ok(())
}

/// Checks that the numbers of a group's step are finite in the compute dtype: f64 for f64 Vars, f32
/// for others.
pub(super) fn check_numbers(vars: &NamedVars, numbers: &[(&'static str, f64)]) -> Result<()> {
    for &(name, value) in numbers {
        if (value as f32).is_finite() {
            continue;
        }
        if !value.is_finite() || vars.vars().iter().any(|var| var.dtype() != DType::F64) {
            return Err(Error::InvalidOption {
                name,
                value,
                expected: "a value that is finite in f32, which computes for all Vars but those of f64",
            });
        }
    }
    Ok(())
}
