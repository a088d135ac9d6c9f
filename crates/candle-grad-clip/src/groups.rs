//! Parameter groups: settings by name pattern.

use std::fmt;
use std::sync::Arc;

use wildmatch::WildMatch;

use crate::check::{check_limit, check_not_negative};
use crate::error::{Error, Result};
use crate::vars::check_patterns;

/// A group of Vars, selected by name, with its own settings.
///
/// A Var belongs to the group if one of the patterns matches its whole name: `*` stands for any
/// characters, `?` for one.
///
/// ```
/// use candle_grad_clip::optim::ParamGroup;
///
/// let group = ParamGroup::new("no_decay", &["*.bias", "ln_*"]).weight_decay(0.0);
/// assert_eq!(group.to_string(), "no_decay (*.bias, ln_*) weight_decay 0");
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct ParamGroup {
    name: String,
    patterns: Vec<String>,
    lr_scale: Option<f64>,
    weight_decay: Option<f64>,
    pub(crate) max_norm: Option<f64>,
    no_clip: bool,
}

impl ParamGroup {
    /// A group of the Vars whose names match one of `patterns`, without settings.
    #[must_use]
    pub fn new(name: impl Into<String>, patterns: &[&str]) -> Self {
        Self {
            name: name.into(),
            patterns: patterns.iter().map(ToString::to_string).collect(),
            lr_scale: None,
            weight_decay: None,
            max_norm: None,
            no_clip: false,
        }
    }

    /// Sets the group's learning rate, relative to the optimizer's. A schedule that calls
    /// `set_learning_rate` then changes all groups. The `lr` of a PyTorch group is this times the
    /// optimizer's.
    ///
    /// A group with 0 is frozen, but its gradients still count in the global norm. To exclude them,
    /// set [`no_clip`](Self::no_clip) too.
    #[must_use]
    pub fn lr_scale(mut self, lr_scale: f64) -> Self {
        self.lr_scale = Some(lr_scale);
        self
    }

    /// Sets the group's weight decay, instead of the optimizer's.
    #[must_use]
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = Some(weight_decay);
        self
    }

    /// Limits the norm of the group's gradients as one vector, in addition to the global limit. The
    /// smaller of both coefficients applies.
    #[must_use]
    pub fn max_norm(mut self, max_norm: f64) -> Self {
        self.max_norm = Some(max_norm);
        self
    }

    /// Excludes the group from the global norm and from clipping, with every rule. Use it for
    /// frozen layers, or for matrices whose optimizer normalizes its updates (Muon). Non-finite
    /// elements in its gradients are still handled by [`NonFinite`](crate::NonFinite). Under
    /// `Propagate` they do not affect other Vars. A [`ClipRule`](crate::ClipRule) sees norms of 0
    /// for its Vars.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// use candle_grad_clip::optim::{ParamGroup, ParamGroups, Sgd};
    /// use candle_grad_clip::{Clip, ClippedOptimizer};
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let body = ("body".to_string(), Var::new(&[60f64, 80.0], &Device::Cpu)?);
    /// let head = ("head".to_string(), Var::new(&[1f64], &Device::Cpu)?);
    /// let loss = ((body.1.sqr()?.sum_all()? + head.1.sqr()?.sum_all()?)? / 2.0)?;
    /// let vars = vec![body.clone(), head.clone()];
    /// let groups = ParamGroups::new(vec![ParamGroup::new("frozen", &["body"]).lr_scale(0.0).no_clip()])?;
    /// let opt = ClippedOptimizer::wrap(Sgd::from_named_vars(vars.clone(), 1.0)?, vars, Clip::norm(1.0))?;
    /// let report = opt.with_param_groups(groups)?.backward_step_report(&loss)?;
    /// assert_eq!(report.total_norm()?, 1.0); // not 100.005
    /// assert_eq!(report.record()?.groups[0].total_norm, 100.0);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn no_clip(mut self) -> Self {
        self.no_clip = true;
        self
    }

    /// The group's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The factor of the learning rate: 1 unless set.
    #[must_use]
    pub fn learning_rate_scale(&self) -> f64 {
        self.lr_scale.unwrap_or(1.0)
    }

    /// The group's weight decay, or `weight_decay` if it has none.
    #[must_use]
    pub fn weight_decay_or(&self, weight_decay: f64) -> f64 {
        self.weight_decay.unwrap_or(weight_decay)
    }

    pub(crate) fn is_no_clip(&self) -> bool {
        self.no_clip
    }

    pub(crate) fn has_rates(&self) -> bool {
        self.lr_scale.is_some() || self.weight_decay.is_some()
    }

    fn matches(&self, name: &str) -> bool {
        self.patterns
            .iter()
            .any(|pattern| WildMatch::new(pattern).matches(name))
    }
}

/// The name, patterns and settings: `no_decay (*.bias, ln_*) weight_decay 0`.
impl fmt::Display for ParamGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.patterns.join(", "))?;
        for (name, value) in [
            ("lr_scale", self.lr_scale),
            ("weight_decay", self.weight_decay),
            ("max_norm", self.max_norm),
        ] {
            if let Some(value) = value {
                write!(f, " {name} {value}")?;
            }
        }
        if self.no_clip {
            f.write_str(" no_clip")?;
        }
        Ok(())
    }
}

/// Groups of Vars with their own learning rate, weight decay or clip limit.
///
/// A Var belongs to the first group that matches its name. A Var without a group has the
/// optimizer's settings. The global norm is taken over all groups, and its limit holds for all of
/// them. A group's limit holds in addition:
///
/// ```text
/// g <- g * min(clip_coef, max_norm / (norm of the group's gradients + eps))
/// ```
///
/// A group with [`no_clip`](ParamGroup::no_clip) is in neither norm, and its gradients are not
/// scaled.
///
/// Pass them to
/// [`ClippedOptimizer::with_param_groups`](crate::ClippedOptimizer::with_param_groups), to
/// [`AdamW::with_param_groups`](crate::optim::AdamW::with_param_groups) and
/// [`Sgd::with_param_groups`](crate::optim::Sgd::with_param_groups), or to
/// [`GroupedOptimizer`](crate::optim::GroupedOptimizer) for other optimizers.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::optim::{AdamW, ParamGroup, ParamGroups};
/// use candle_grad_clip::{Clip, ClippedOptimizer};
/// use candle_nn::{Optimizer, ParamsAdamW};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let vars = vec![
///     ("fc.weight".to_string(), Var::new(&[3f64, 4.0], &Device::Cpu)?),
///     ("fc.bias".to_string(), Var::new(&[1f64], &Device::Cpu)?),
/// ];
/// let loss = (vars[0].1.sqr()?.sum_all()? + vars[1].1.sqr()?.sum_all()?)?;
/// let groups = ParamGroups::new(vec![
///     ParamGroup::new("no_decay", &["*.bias"]).weight_decay(0.0).max_norm(0.5),
/// ])?;
/// let opt = AdamW::from_named_vars(vars.clone(), ParamsAdamW::default())?;
/// let mut opt = ClippedOptimizer::wrap(opt, vars, Clip::norm(100.0))?.with_param_groups(groups)?;
/// let report = opt.backward_step_report(&loss)?;
/// assert_eq!(report.record()?.groups[0].total_norm, 2.0);
/// assert!((report.record()?.groups[0].clip_coef - 0.25).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ParamGroups(Arc<[ParamGroup]>);

impl ParamGroups {
    /// A list of groups, which are checked.
    ///
    /// # Errors
    /// A setting outside its range: `lr_scale` and `weight_decay` are 0 or above, `max_norm` is
    /// above 0. A `max_norm` in a group with `no_clip`.
    pub fn new(groups: Vec<ParamGroup>) -> Result<Self> {
        for group in &groups {
            check_not_negative("lr_scale", group.learning_rate_scale())?;
            check_not_negative("weight_decay", group.weight_decay_or(0.0))?;
            check_limit("max_norm", group.max_norm.unwrap_or(f64::INFINITY))?;
            if let (true, Some(value)) = (group.no_clip, group.max_norm) {
                return Err(Error::InvalidOption {
                    name: "max_norm",
                    value,
                    expected: "none in a group with no_clip",
                });
            }
        }
        Ok(Self(groups.into()))
    }

    /// The groups, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, ParamGroup> {
        self.0.iter()
    }

    /// The same groups without `lr_scale` and `weight_decay`. For a
    /// [`ClippedOptimizer`](crate::ClippedOptimizer) around an optimizer that already has these
    /// settings, such as [`GroupedOptimizer`](crate::optim::GroupedOptimizer).
    #[must_use]
    pub fn max_norms_only(&self) -> Self {
        let only_limit = |group: &ParamGroup| ParamGroup {
            lr_scale: None,
            weight_decay: None,
            ..group.clone()
        };
        Self(self.iter().map(only_limit).collect())
    }

    pub(crate) fn has_limits(&self) -> bool {
        self.iter().any(|group| group.max_norm.is_some())
    }

    /// Like [`ParamGroups::group_of`], but counted from 1; 0 for none.
    pub(crate) fn assign(&self, names: &[String]) -> Result<Arc<[usize]>> {
        let groups = self.group_of(names)?;
        let place = |group: &Option<usize>| group.map_or(0, |index| index + 1);
        Ok(groups.iter().map(place).collect())
    }

    /// The group of each name, as its index in this list.
    ///
    /// # Errors
    /// A pattern that matches no name, which is most likely a typing error.
    pub(crate) fn group_of(&self, names: &[String]) -> Result<Arc<[Option<usize>]>> {
        for group in self {
            check_patterns(&group.name, &group.patterns, names)?;
        }
        let group = |name: &String| self.iter().position(|group| group.matches(name));
        Ok(names.iter().map(group).collect())
    }
}

impl<'a> IntoIterator for &'a ParamGroups {
    type Item = &'a ParamGroup;
    type IntoIter = std::slice::Iter<'a, ParamGroup>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Checks the groups of an optimizer without a wrapper, which does not clip.
pub(crate) fn check_no_limits(groups: &ParamGroups) -> Result<()> {
    for group in groups {
        if group.is_no_clip() {
            return Err(Error::InvalidClip {
                text: group.to_string(),
                reason: "an optimizer by itself clips nothing: give groups with no_clip to a ClippedOptimizer around it"
                    .to_string(),
            });
        }
        if let Some(max_norm) = group.max_norm {
            return Err(Error::InvalidOption {
                name: "max_norm",
                value: max_norm,
                expected: "none in the groups of an optimizer by itself: give them to a ClippedOptimizer around it",
            });
        }
    }
    Ok(())
}
