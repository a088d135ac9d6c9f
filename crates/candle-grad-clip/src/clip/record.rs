//! How checkpoints write a [`Clip`] and its history. Apart from the feature `serde`, so that a format that must be read
//! for years does not hang on how other data is written.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use candle_grad_clip_kernels::NormType;

use super::{Clip, Method, NonFinite, RuleState, adagc, auto, quantile, skip, zclip};

/// For `#[serde(with)]`.
pub(crate) mod clip {
    use super::{Clip, ClipRecord, Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(clip: &Clip, serializer: S) -> Result<S::Ok, S::Error> {
        ClipRecord::from(clip).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Clip, D::Error> {
        let record = ClipRecord::deserialize(deserializer)?;
        record.clip().map_err(serde::de::Error::custom)
    }
}

/// A [`Clip`]. Of several rules each has its own eps in the method's text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClipRecord {
    method: MethodRecord,
    #[serde(with = "NormTypeRecord")]
    norm_type: NormType,
    #[serde(with = "crate::serde_float")]
    eps: f64,
    #[serde(with = "NonFiniteRecord")]
    non_finite: NonFinite,
    max_skips: u32,
}

impl From<&Clip> for ClipRecord {
    fn from(clip: &Clip) -> Self {
        let only_rules = |rules| Clip {
            rules,
            ..Clip::none()
        };
        let (method, eps) = match &clip.rules[..] {
            [rule] => {
                let method = match &rule.method {
                    Method::None => MethodRecord::None,
                    Method::Norm { max_norm } => MethodRecord::Norm {
                        max_norm: *max_norm,
                    },
                    Method::Value { clip_value } => MethodRecord::Value {
                        clip_value: *clip_value,
                    },
                    other => MethodRecord::Rule(Clip::new(other.clone()).to_string()),
                };
                (method, rule.eps)
            }
            rules => {
                let text = only_rules(rules.to_vec()).to_string();
                (MethodRecord::Rule(text), super::CLIP_EPS)
            }
        };
        Self {
            method,
            norm_type: clip.norm_type,
            eps,
            non_finite: clip.non_finite,
            max_skips: clip.max_skips,
        }
    }
}

impl ClipRecord {
    fn clip(self) -> crate::Result<Clip> {
        let mut clip = match self.method {
            MethodRecord::None => Clip::none(),
            MethodRecord::Norm { max_norm } => Clip::norm(max_norm),
            MethodRecord::Value { clip_value } => Clip::value(clip_value),
            MethodRecord::Rule(text) => text.parse()?,
        };
        if clip.rules.len() == 1 {
            clip = clip.eps(self.eps);
        }
        Ok(Clip {
            norm_type: self.norm_type,
            non_finite: self.non_finite,
            max_skips: self.max_skips,
            ..clip
        })
    }
}

/// The first three as they were written from the start, the others as text.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
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
    Rule(String),
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

/// A [`RuleState`]: what is empty is left out, and so are the lists, which are arrays in the file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RuleRecord {
    /// Of the methods that keep norms: `auto`, `skip`, and the warm-up of `zclip`.
    #[serde(skip)]
    auto_norms: Vec<f64>,
    #[serde(skip)]
    skip_norms: Vec<f64>,
    #[serde(skip)]
    skip_losses: Vec<f64>,
    #[serde(skip)]
    zclip_warmup: Vec<f64>,
    /// Mean and variance.
    #[serde(skip_serializing_if = "Option::is_none")]
    zclip: Option<(f64, f64)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quantile_max_norm: Option<f64>,
    #[serde(skip_serializing_if = "is_zero")]
    adagc_steps: u64,
    /// By the Vars' names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    adagc_means: BTreeMap<String, f64>,
}

// serde passes a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(x: &u64) -> bool {
    *x == 0
}

impl RuleRecord {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The lists, by their names in the file.
    pub(crate) fn lists(&mut self) -> [(&'static str, &mut Vec<f64>); 4] {
        [
            ("clip.auto_norms", &mut self.auto_norms),
            ("clip.skip_norms", &mut self.skip_norms),
            ("clip.skip_losses", &mut self.skip_losses),
            ("clip.zclip_warmup", &mut self.zclip_warmup),
        ]
    }

    /// Steps that the rule has counted.
    pub(crate) fn steps(&self) -> u64 {
        self.adagc_steps
    }

    /// Vars that have a mean and are not among `names`.
    pub(crate) fn unknown(&self, names: &[String]) -> Vec<String> {
        let known: std::collections::HashSet<&String> = names.iter().collect();
        let means = self.adagc_means.keys();
        means
            .filter(|name| !known.contains(name))
            .cloned()
            .collect()
    }

    /// What no training can have left.
    pub(crate) fn fault(&self) -> Option<String> {
        let lists = [&self.auto_norms, &self.skip_norms, &self.zclip_warmup];
        let norms = lists.into_iter().flatten().chain(self.adagc_means.values());
        let pair = self.zclip.map(|(mean, variance)| [mean, variance]);
        let mut norms = norms.copied().chain(pair.into_iter().flatten());
        let bad = norms.find(|norm| !(*norm >= 0.0 && norm.is_finite()));
        let max_norm = self
            .quantile_max_norm
            .filter(|x| !(*x > 0.0 && x.is_finite()));
        let loss = self.skip_losses.iter().copied().find(|x| !x.is_finite());
        if let Some(bad) = loss {
            return Some(format!("the clip's history has {bad}, expected losses"));
        }
        let bad = bad.or(max_norm)?;
        Some(format!("the clip's history has {bad}, expected norms"))
    }

    /// The history that was written, for Vars of these names.
    pub(crate) fn state(&self, names: &[String]) -> RuleState {
        let means = |name: &String| self.adagc_means.get(name).copied();
        RuleState {
            auto: auto::History::new(self.auto_norms.clone()),
            zclip: zclip::State {
                warmup: self.zclip_warmup.clone(),
                statistics: self
                    .zclip
                    .map(|(mean, variance)| zclip::Statistics { mean, variance }),
            },
            adagc: adagc::State {
                means: names.iter().map(means).collect(),
                steps: self.adagc_steps,
            },
            quantile: quantile::State {
                max_norm: self.quantile_max_norm,
            },
            skip: skip::Window {
                norms: self.skip_norms.clone().into(),
                losses: self.skip_losses.clone().into(),
            },
        }
    }
}

impl RuleState {
    /// The history as it is written, of Vars of these names.
    pub(crate) fn record(&self, names: &[String]) -> RuleRecord {
        let means = names.iter().zip(&self.adagc.means);
        let statistics = self.zclip.statistics;
        RuleRecord {
            auto_norms: self.auto.norms(),
            skip_norms: self.skip.norms.iter().copied().collect(),
            skip_losses: self.skip.losses.iter().copied().collect(),
            zclip_warmup: self.zclip.warmup.clone(),
            zclip: statistics.map(|statistics| (statistics.mean, statistics.variance)),
            quantile_max_norm: self.quantile.max_norm,
            adagc_steps: self.adagc.steps,
            adagc_means: means
                .filter_map(|(name, mean)| Some((name.clone(), (*mean)?)))
                .collect(),
        }
    }
}
