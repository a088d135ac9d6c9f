//! One rule of a [`Clip`](super::Clip): its method, and the choice of the file that decides for it.

use super::zclip::Verdict;
use super::{
    AdaGc, Agc, AutoClip, CLIP_EPS, Decision, Observed, QuantileClip, RuleState, SkipSteps, ZClip,
    agc, block_rms, history, norm, param_norm, value,
};
use crate::check::{check_limit, check_not_negative};
use crate::error::Result;
use crate::gradients::Measurements;
use crate::skip_reason::SkipReason;

/// One method, with what it adds to norms.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rule {
    pub(super) method: Method,
    pub(super) eps: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Method {
    None,
    Norm { max_norm: f64 },
    Value { clip_value: f64 },
    ParamNorm { max_norm: f64 },
    BlockRms { max_rms: f64 },
    Auto(AutoClip),
    Quantile(QuantileClip),
    ZClip(ZClip),
    AdaGc(AdaGc),
    Agc(agc::Rule),
    Skip(SkipSteps),
}

impl Method {
    pub(super) fn default_eps(&self) -> f64 {
        match self {
            // These papers have none.
            Self::BlockRms { .. } | Self::AdaGc(_) => 0.0,
            Self::Agc(_) => Agc::default().eps,
            _ => CLIP_EPS,
        }
    }
}

impl Rule {
    pub(super) fn check(&self) -> Result<()> {
        match &self.method {
            Method::None => {}
            Method::Norm { max_norm } | Method::ParamNorm { max_norm } => {
                check_limit("max_norm", *max_norm)?;
            }
            Method::Value { clip_value } => check_limit("clip_value", *clip_value)?,
            Method::BlockRms { max_rms } => check_limit("max_rms", *max_rms)?,
            Method::Auto(rule) => rule.check()?,
            Method::Quantile(rule) => rule.check()?,
            Method::ZClip(rule) => rule.check()?,
            Method::AdaGc(rule) => rule.check()?,
            Method::Agc(rule) => rule.check(self.eps)?,
            Method::Skip(rule) => rule.check()?,
        }
        check_not_negative("eps", self.eps)
    }

    /// The decision of this rule alone, without limits of groups.
    pub(super) fn decide(
        &self,
        state: &RuleState,
        measured: &Measurements<'_>,
        zero_non_finite: bool,
    ) -> Decision {
        let eps = self.eps;
        let total_norm = if zero_non_finite {
            measured.norm().value()
        } else {
            measured.total_norm()
        };
        // What may enter a history.
        let norm = Some(total_norm).filter(|norm| history::counts(*norm));
        let chosen = |max_norm| history::limit(max_norm, total_norm);
        // What may enter that of the losses: a step of norm 0 leaves it alone too.
        let loss = measured.loss.filter(|_| total_norm != 0.0);
        let to_norm = |max_norm, observed| Decision {
            observed,
            ..norm::decide(measured, max_norm, eps, zero_non_finite)
        };
        match &self.method {
            Method::None => Decision::scale(measured, 1.0, zero_non_finite),
            Method::Norm { max_norm } => to_norm(*max_norm, Observed::Nothing),
            Method::Value { clip_value } => value::decide(measured, *clip_value, zero_non_finite),
            Method::ParamNorm { max_norm } => {
                param_norm::decide(measured, *max_norm, eps, zero_non_finite)
            }
            Method::BlockRms { max_rms } => {
                block_rms::decide(measured, *max_rms, eps, zero_non_finite)
            }
            Method::Auto(rule) => to_norm(
                chosen(rule.max_norm(&state.auto, norm)),
                Observed::norm(norm),
            ),
            Method::Quantile(_) => to_norm(
                chosen(QuantileClip::max_norm(&state.quantile)),
                Observed::norm(norm),
            ),
            Method::ZClip(rule) => match rule.decide(&state.zclip, norm) {
                Verdict::Skip => Decision::refuse(SkipReason::LargeNorm),
                Verdict::Clip { max_norm, observed } => to_norm(max_norm, observed),
            },
            Method::AdaGc(rule) => rule.decide(&state.adagc, measured, eps, zero_non_finite),
            Method::Agc(rule) => rule.decide(measured, eps, zero_non_finite),
            Method::Skip(rule) => match rule.skips(&state.skip, total_norm, measured.loss) {
                Some(reason) => Decision::refuse(reason),
                None => to_norm(rule.max_norm, rule.observed(norm, loss)),
            },
        }
    }
}
