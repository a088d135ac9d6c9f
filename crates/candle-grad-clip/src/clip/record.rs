//! How checkpoints write a [`Clip`]. Apart from the feature `serde`, so that a format that must be read for years
//! does not hang on how other data is written.

use serde::{Deserialize, Serialize};

use super::{Clip, Method, NonFinite, NormType};

/// For `#[serde(with)]`.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Clip", deny_unknown_fields)]
pub(crate) struct ClipRecord {
    #[serde(with = "MethodRecord")]
    method: Method,
    #[serde(with = "NormTypeRecord")]
    norm_type: NormType,
    #[serde(with = "crate::serde_float")]
    eps: f64,
    #[serde(with = "NonFiniteRecord")]
    non_finite: NonFinite,
    max_skips: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Method", rename_all = "snake_case", deny_unknown_fields)]
enum MethodRecord {
    None,
    Norm {
        #[serde(with = "crate::serde_float")]
        max_norm: f64,
    },
    Value {
        #[serde(with = "crate::serde_float")]
        clip_value: f64,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "NormType", rename_all = "snake_case")]
enum NormTypeRecord {
    L1,
    L2,
    Inf,
    P(#[serde(with = "crate::serde_float")] f64),
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "NonFinite", rename_all = "snake_case")]
enum NonFiniteRecord {
    Error,
    SkipStep,
    Zero,
    Propagate,
}
