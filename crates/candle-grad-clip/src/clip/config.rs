//! [`Clip`]: the clipping configuration.

use std::sync::Arc;

use candle_grad_clip_kernels::NormType;

use super::adagc::AdaGc;
use super::agc::Agc;
use super::auto::AutoClip;
use super::chain;
use super::methods::AnyMethod;
use super::non_finite::NonFinite;
use super::none::NoClip;
use super::quantile::QuantileClip;
use super::rule::{Limit, Scope};
use super::skip::SkipSteps;
use super::stabilizer::GradientStabilizer;
use super::zclip::ZClip;
use crate::check::{check_limit, check_norm_type, check_not_negative};
use crate::error::{Error, Result};
use crate::gradients::{Plan, Request, UnitPlan};
use crate::groups::{ParamGroup, ParamGroups};
use crate::vars::NamedVars;

/// The clipping configuration: plain data. Whatever takes a `Clip` checks it.
///
/// | | |
/// |---|---|
/// | [`Clip::none`] | measure and report only |
/// | [`Clip::norm`] | `g * min(1, max_norm / (total_norm + eps))`, one coefficient for all Vars |
/// | [`Clip::value`] | clamp every element to `[-clip_value, clip_value]` |
/// | [`Clip::param_norm`] | `g_i * min(1, max_norm / (param_norm_i + eps))`, a coefficient for each Var |
/// | [`Clip::block_rms`] | `g_i * min(1, max_rms / rms_i)`, a coefficient for each Var |
/// | [`Clip::autoclip`] | AutoClip: as `norm`, with a percentile of the norms so far as the limit |
/// | [`Clip::quantile`] | as `norm`, with a running estimate of a quantile of the norms as the limit |
/// | [`Clip::zclip`] | ZClip: as `norm`, and clips spikes by their z-score |
/// | [`Clip::adagc`] | AdaGC: each Var to slightly above its running mean norm |
/// | [`Clip::agc`] | AGC: each unit relative to its weights' norm |
/// | [`Clip::stabilizer`] | GradientStabilizer: each Var to a length near 1, by running means of its norm |
/// | [`Clip::skip_above_norm`], [`Clip::skip_above_zscore`] | skip steps whose norm is too large |
/// | [`Clip::chain`] | several of these, one after the other |
///
/// The [`ClippedOptimizer`](crate::ClippedOptimizer) keeps the history of a method, and saves it in
/// its checkpoints. Norms that are 0 or non-finite, and norms of skipped or failed steps, never
/// enter it. A limit that a method chooses is never 0.
///
/// As text ([`Clip::from_str`](#impl-FromStr-for-Clip), and with the feature `serde` as a string):
///
/// ```
/// use candle_grad_clip::{Clip, NonFinite};
///
/// let clip = Clip::norm(1.0).non_finite(NonFinite::Error);
/// assert_eq!(clip.to_string(), "norm:1,non_finite=error");
/// assert_eq!(clip, "norm:1,non_finite=error".parse()?);
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "String", into = "String"))]
pub struct Clip {
    /// The methods in order, at least one.
    pub(super) parts: Vec<Part>,
    pub(super) norm_type: NormType,
    pub(crate) non_finite: NonFinite,
    pub(crate) max_skips: u32,
}

/// One method with its eps.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Part {
    pub(super) method: AnyMethod,
    pub(super) eps: f64,
}

impl Clip {
    pub(super) fn new(method: impl Into<AnyMethod>) -> Self {
        let method = method.into();
        let eps = method.config().default_eps();
        Self {
            parts: vec![Part { method, eps }],
            norm_type: NormType::L2,
            non_finite: NonFinite::SkipStep,
            max_skips: 10,
        }
    }

    /// Chains the clips.
    pub(super) fn chain_of(clips: Vec<Clip>) -> Result<Self> {
        let default = Self::new(NoClip);
        let mut whole = default.clone();
        let text: Vec<String> = clips.iter().map(ToString::to_string).collect();
        let text = text.join("+");
        for clip in &clips {
            let merged = [
                merge(&mut whole.norm_type, clip.norm_type, default.norm_type),
                merge(&mut whole.non_finite, clip.non_finite, default.non_finite),
                merge(&mut whole.max_skips, clip.max_skips, default.max_skips),
            ];
            if let Some(at) = merged.iter().position(|is_merged| !is_merged) {
                let name = ["norm_type", "non_finite", "max_skips"][at];
                let reason = format!("{name} holds for the whole chain, and is given twice");
                return Err(Error::InvalidClip { text, reason });
            }
        }
        let parts = clips.into_iter().flat_map(|clip| clip.parts);
        let parts: Vec<Part> = parts.filter(|part| !part.is_none()).collect();
        if !parts.is_empty() {
            whole.parts = parts;
        }
        whole.check_order()?;
        Ok(whole)
    }

    /// Checks every field.
    pub(crate) fn check(&self) -> Result<()> {
        check_norm_type(self.norm_type)?;
        for part in &self.parts {
            part.method.config().check(part.eps)?;
            check_not_negative("eps", part.eps)?;
        }
        self.check_order()
    }

    /// Checks that the methods can be chained.
    fn check_order(&self) -> Result<()> {
        let parts = self.parts.iter();
        let parts: Vec<_> = parts
            .map(|part| (part.method.name(), part.scope()))
            .collect();
        match chain::fault(&parts) {
            Some(reason) => Err(Error::InvalidClip {
                text: self.to_string(),
                reason,
            }),
            None => Ok(()),
        }
    }

    /// Whether this is [`Clip::none`]: only the non-finite policy applies.
    pub(super) fn is_none(&self) -> bool {
        self.parts.iter().all(Part::is_none)
    }

    /// Whether tiny coefficients are meant.
    pub(crate) fn sets_lengths(&self) -> bool {
        let mut parts = self.parts.iter();
        parts.any(|part| part.method.config().sets_lengths())
    }

    pub(crate) fn request(&self) -> Request {
        let clip_value = self.parts.iter().find_map(|part| match part.scope() {
            Scope::Elements { clip_value } => Some(clip_value),
            _ => None,
        });
        Request {
            norm_type: self.norm_type,
            clip_value,
            zero_non_finite: self.non_finite == NonFinite::Zero,
        }
    }

    /// The limit of the global norm. `None` without one, or if it is infinite or not fixed, as for
    /// a method that adapts it, for a limit per Var and for a chain.
    ///
    /// ```
    /// use candle_grad_clip::Clip;
    ///
    /// assert_eq!(Clip::norm(2.5).max_norm(), Some(2.5));
    /// assert_eq!(Clip::none().max_norm(), None);
    /// assert_eq!(Clip::value(1.0).max_norm(), None);
    /// ```
    #[must_use]
    pub fn max_norm(&self) -> Option<f64> {
        let [part] = &self.parts[..] else {
            return None;
        };
        let limit = part.method.config().device_max_norm()?;
        limit.is_finite().then_some(limit)
    }

    /// The plan with which a GPU decides this clip. `None` for a clip with a history, or one that
    /// has to return an error at once.
    pub(super) fn plan(&self) -> Option<Plan> {
        let [part] = &self.parts[..] else {
            return None;
        };
        let max_norm = part.method.config().device_max_norm()?;
        (self.non_finite != NonFinite::Error).then(|| Plan {
            request: self.request(),
            max_norm,
            eps: part.eps,
            skip_non_finite: self.non_finite == NonFinite::SkipStep,
        })
    }

    /// The units of `vars`, if a method needs their norms.
    pub(super) fn unit_plan(&self, vars: &NamedVars) -> Result<Option<Arc<UnitPlan>>> {
        for part in &self.parts {
            if let Some(plan) = part.method.config().unit_plan(vars)? {
                return Ok(Some(plan));
            }
        }
        Ok(None)
    }

    /// Checks that the methods work with groups that have a `max_norm` or `no_clip`.
    pub(super) fn check_groups(&self, groups: &ParamGroups) -> Result<()> {
        let scopes = || self.parts.iter().map(Part::scope);
        let fault = scopes().find_map(|scope| match scope {
            Scope::Elements { clip_value } => Some(("clip_value", clip_value)),
            Scope::Units { clipping } => Some(("clipping", clipping)),
            Scope::Nothing | Scope::Vars => None,
        });
        if let Some((name, value)) = fault.filter(|_| groups.has_limits()) {
            return Err(Error::InvalidOption {
                name,
                value,
                expected: "Clip::norm, Clip::none or another that scales whole Vars together with groups that have a max_norm",
            });
        }
        let clipping = scopes().find_map(|scope| match scope {
            Scope::Units { clipping } => Some(clipping),
            _ => None,
        });
        match clipping {
            Some(value) if groups.iter().any(ParamGroup::is_no_clip) => Err(Error::InvalidOption {
                name: "clipping",
                value,
                expected: "another clip than agc beside groups with no_clip: give their patterns to its `exclude`",
            }),
            _ => Ok(()),
        }
    }

    /// Sets the limit that a schedule controls: the `max_norm`, or else the only other limit.
    /// Returns the index of its method.
    ///
    /// # Errors
    /// A limit that is not above 0, no limit to set, or more than one. Nothing is changed then.
    pub(super) fn set_limit(&mut self, value: f64) -> Result<usize> {
        let limits = self.parts.iter_mut().enumerate();
        let limits = limits.filter_map(|(at, part)| Some((at, part.method.config_mut().limit()?)));
        let mut limits: Vec<(usize, Limit<'_>)> = limits.collect();
        limits.sort_by_key(|(_, (kind, ..))| *kind);
        let reason = match &mut limits[..] {
            [] => "it has no limit that a schedule could set, expected one such as norm",
            [(_, (first, ..)), (_, (second, ..)), ..] if first == second => {
                "it has more than one limit that a schedule could set, expected one"
            }
            [(at, (_, name, limit)), ..] => {
                check_limit(name, value)?;
                **limit = value;
                return Ok(*at);
            }
        };
        Err(Error::InvalidClip {
            text: self.to_string(),
            reason: reason.to_string(),
        })
    }

    /// Checks that there is a limit to schedule.
    pub(super) fn check_schedule(&self) -> Result<()> {
        let mut finite = self.clone();
        finite.set_limit(1.0)?;
        finite.check()
    }
}

impl Part {
    pub(super) fn scope(&self) -> Scope {
        self.method.config().scope()
    }

    fn is_none(&self) -> bool {
        matches!(self.method, AnyMethod::NoClip(_))
    }
}

/// Merges a setting of one clip into that of the chain. A default gives way. False if another clip
/// has set a different value.
fn merge<T: PartialEq + Copy>(whole: &mut T, clip: T, default: T) -> bool {
    if clip == default {
        return true;
    }
    let is_free = *whole == default || *whole == clip;
    *whole = clip;
    is_free
}

/// The `eps` of [`Agc`] becomes that of [`Clip::eps`].
impl From<Agc> for Clip {
    fn from(agc: Agc) -> Self {
        let (eps, default) = (agc.eps, Agc::default());
        Self::new(Agc {
            eps: default.eps,
            ..agc
        })
        .eps(eps)
    }
}

macro_rules! from_config {
    ($($config:ident),*) => {
        $(
            impl From<$config> for Clip {
                fn from(config: $config) -> Self {
                    Self::new(config)
                }
            }
        )*
    };
}
from_config!(
    AdaGc,
    AutoClip,
    GradientStabilizer,
    QuantileClip,
    SkipSteps,
    ZClip
);
