//! A clip with its running rules and the param groups, for the Vars of one wrapper.

use std::path::Path;
use std::sync::Arc;

use super::chain;
use super::coef::CLIP_EPS;
use super::config::Clip;
use super::custom::{ClipRule, Custom};
use super::decision::{Action, Decision, Given};
use super::groups::{self, Limits};
use super::non_finite::NonFinite;
use super::record::RuleRecord;
use super::rule::{Asked, Rule, Saved};
use crate::error::{Error, Result};
use crate::gradients::{Measurements, Plan, Request, UnitPlan};
use crate::groups::ParamGroups;
use crate::skip_reason::SkipReason;
use crate::vars::NamedVars;

/// A clip with its running rules, for some Vars.
pub(crate) struct Policy {
    clip: Clip,
    /// One for each method of the clip, or only the user-defined rule.
    rules: Vec<Box<dyn Rule>>,
    /// Whether the rule is user-defined. The clip is then none, and only its settings apply.
    is_custom: bool,
    /// Whether a schedule sets the clip's limit.
    is_scheduled: bool,
    /// The units to measure, if a rule needs them.
    units: Option<Arc<UnitPlan>>,
    limits: Limits,
}

/// A clip and its rules from a checkpoint, checked for the Vars of a policy.
pub(crate) struct Resumed {
    clip: Clip,
    /// `None` for a user-defined rule, which is restored already.
    rules: Option<Vec<Box<dyn Rule>>>,
    units: Option<Arc<UnitPlan>>,
}

/// Starts the clip's rules, with empty histories.
fn start(clip: &Clip) -> Vec<Box<dyn Rule>> {
    let parts = clip.parts.iter();
    parts.map(|part| part.method.config().start()).collect()
}

impl Policy {
    /// For these Vars, without groups.
    pub(crate) fn new(clip: Clip, vars: &NamedVars) -> Result<Self> {
        clip.check()?;
        let units = clip.unit_plan(vars)?;
        Ok(Self {
            units,
            ..Self::of_norms(clip)
        })
    }

    /// For gradients of which only the norms are known.
    pub(crate) fn of_norms(clip: Clip) -> Self {
        Self {
            rules: start(&clip),
            clip,
            is_custom: false,
            is_scheduled: false,
            units: None,
            limits: Limits::default(),
        }
    }

    pub(crate) fn clip(&self) -> &Clip {
        &self.clip
    }

    /// Replaces the clip. A method that both clips have keeps its history.
    pub(crate) fn set_clip(&mut self, clip: Clip, vars: &NamedVars) -> Result<()> {
        let units = self.check_clip(&clip, vars)?;
        if !self.is_custom {
            let mut rules = start(&clip);
            for (part, rule) in clip.parts.iter().zip(&mut rules) {
                let name = part.method.name();
                let mut before = self.clip.parts.iter().zip(&self.rules);
                let before = before.find(|(part, _)| part.method.name() == name);
                let saved = before.map_or_else(Saved::default, |(_, rule)| rule.save());
                if !saved.is_empty() {
                    let _ = rule.load(&saved); // a rule can load what it has saved
                }
            }
            self.rules = rules;
        }
        self.clip = clip;
        self.units = units;
        Ok(())
    }

    /// Checks a clip for these Vars and groups, and returns the units that it needs.
    fn check_clip(&self, clip: &Clip, vars: &NamedVars) -> Result<Option<Arc<UnitPlan>>> {
        clip.check()?;
        clip.check_groups(self.limits.groups())?;
        if self.is_scheduled {
            clip.check_schedule()?;
        }
        if self.is_custom {
            check_none(clip)?;
        }
        clip.unit_plan(vars)
    }

    /// Sets a user-defined rule.
    pub(crate) fn set_rule(&mut self, rule: impl ClipRule + 'static) -> Result<()> {
        check_none(&self.clip)?;
        self.rules = vec![Box::new(Custom::new(rule))];
        self.is_custom = true;
        Ok(())
    }

    /// Called if a schedule will call [`set_limit`](Self::set_limit).
    pub(crate) fn expect_schedule(&mut self) -> Result<()> {
        self.clip.check_schedule()?;
        self.is_scheduled = true;
        Ok(())
    }

    /// Sets the limit of the next step.
    pub(crate) fn set_limit(&mut self, value: f64) -> Result<()> {
        let at = self.clip.set_limit(value)?;
        self.rules[at].set_limit(value);
        Ok(())
    }

    /// The groups of these Vars, checked.
    pub(crate) fn limits_of(&self, groups: ParamGroups, names: &[String]) -> Result<Limits> {
        self.clip.check_groups(&groups)?;
        Limits::new(groups, names)
    }

    pub(crate) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What to measure.
    pub(crate) fn request(&self) -> Request {
        self.clip.request()
    }

    /// The units to measure, if any.
    pub(crate) fn units(&self) -> Option<&Arc<UnitPlan>> {
        self.units.as_ref()
    }

    /// Whether a rule needs the loss.
    pub(crate) fn reads_loss(&self) -> bool {
        self.rules.iter().any(|rule| rule.reads_loss())
    }

    /// Whether a coefficient may be above 1.
    pub(crate) fn may_grow(&self) -> bool {
        self.is_custom
    }

    /// The plan with which a GPU decides, if it can.
    pub(crate) fn device_plan(&self) -> Option<Plan> {
        let is_plain = self.limits.is_empty() && !self.is_custom;
        is_plain.then(|| self.clip.plan()).flatten()
    }

    /// Called before [`decide`](Self::decide). Returns a bound to measure the gradients with as
    /// well. `step` is the step's number.
    pub(crate) fn ask(
        &mut self,
        measured: &Measurements<'_>,
        names: &Arc<[String]>,
        step: u64,
    ) -> Result<Option<f64>> {
        let bad = measured.total.stats.non_finite() > 0;
        let non_finite = self.clip.non_finite;
        if bad && matches!(non_finite, NonFinite::Error | NonFinite::SkipStep) {
            return Ok(None);
        }
        let asked = Asked {
            measured,
            non_finite,
            names,
            step,
        };
        for rule in &mut self.rules {
            let Some(value) = rule.ask(&asked)? else {
                continue;
            };
            if self.limits.groups().has_limits() {
                return Err(Error::InvalidOption {
                    name: "the bound of the ClipRule",
                    value,
                    expected: "no Clamp beside groups that have a max_norm",
                });
            }
            return Ok(Some(value));
        }
        Ok(None)
    }

    /// Decides the step. The histories change only in [`observe`](Self::observe).
    pub(crate) fn decide(&mut self, measured: &Measurements<'_>) -> Decision {
        let bad = measured.total.stats.non_finite() > 0;
        let zero_non_finite = match self.clip.non_finite {
            NonFinite::Error | NonFinite::SkipStep if bad => {
                return Decision::skip(SkipReason::NonFinite);
            }
            NonFinite::Zero => bad,
            NonFinite::Error | NonFinite::SkipStep | NonFinite::Propagate => false,
        };
        let eps = self.clip.parts.iter().map(|part| part.eps);
        let rules = self.rules.iter_mut().zip(eps);
        let decision = chain::decide(rules, measured, zero_non_finite);
        if self.limits.is_empty() || matches!(decision.action, Action::Skip(_)) {
            return decision;
        }
        let given = Given {
            measured,
            // In a chain, the groups' limits use the eps of the last clip.
            eps: self.clip.parts.last().map_or(CLIP_EPS, |part| part.eps),
            zero_non_finite,
        };
        groups::decide(&given, decision, &self.limits)
    }

    /// Called after the step was taken as last decided.
    pub(crate) fn observe(&mut self) {
        self.rules.iter_mut().for_each(|rule| rule.observe());
    }

    /// The methods' histories for a checkpoint, for Vars with these names.
    pub(crate) fn record(&self, names: &[String]) -> RuleRecord {
        if self.is_custom {
            return RuleRecord::default();
        }
        RuleRecord::new(&self.clip, &self.rules, names)
    }

    /// The state of the user-defined rule, for a checkpoint.
    pub(crate) fn custom_record(&self) -> Vec<f64> {
        let rules = self.rules.iter().filter(|_| self.is_custom);
        rules.flat_map(|rule| rule.save().numbers).collect()
    }

    /// Checks the clip and the histories of a checkpoint for this policy. A user-defined rule loads
    /// `custom` here, so nothing may fail after this.
    pub(crate) fn resumed(
        &mut self,
        (clip, record, custom): (&Clip, &RuleRecord, &[f64]),
        vars: &NamedVars,
        path: &Path,
    ) -> Result<Resumed> {
        let fault = |reason: String| Error::Checkpoint {
            path: path.to_path_buf(),
            reason,
        };
        let units = self.check_clip(clip, vars)?;
        let unknown = record.unknown(vars.names());
        if !unknown.is_empty() {
            return Err(Error::CheckpointMismatch {
                path: path.to_path_buf(),
                differences: vec![format!(
                    "the clip's means are of Vars that are not here: {}",
                    unknown.join(", ")
                )],
            });
        }
        let mut rules = None;
        match (self.is_custom, custom) {
            (true, []) => {}
            (true, numbers) => {
                let saved = Saved::numbers(numbers.to_vec());
                let loaded = self.rules.iter_mut().try_for_each(|rule| rule.load(&saved));
                loaded.map_err(|reason| fault(format!("its ClipRule's state: {reason}")))?;
            }
            (false, []) => rules = Some(record.start(clip, vars.names()).map_err(fault)?),
            (false, _) => {
                let reason = "it has the state of a ClipRule, expected a wrapper that was given one by with_rule";
                return Err(fault(reason.to_string()));
            }
        }
        Ok(Resumed {
            clip: clip.clone(),
            rules,
            units,
        })
    }

    pub(crate) fn resume(&mut self, resumed: Resumed) {
        self.clip = resumed.clip;
        self.units = resumed.units;
        self.rules = resumed
            .rules
            .unwrap_or_else(|| std::mem::take(&mut self.rules));
    }
}

/// Checks the clip beside a user-defined rule.
fn check_none(clip: &Clip) -> Result<()> {
    if clip.is_none() {
        return Ok(());
    }
    Err(Error::InvalidClip {
        text: clip.to_string(),
        reason: "a ClipRule decides here, expected none (which may have norm_type, non_finite and max_skips)"
            .to_string(),
    })
}
