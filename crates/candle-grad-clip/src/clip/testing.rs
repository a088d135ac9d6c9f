//! Measured gradients for the tests of rules.

use candle_core::{Device, Tensor};
use candle_grad_clip_kernels::{NormType, measure};

use super::coef::CLIP_EPS;
use super::decision::{Decision, Given};
use super::rule::Rule;
use crate::gradients::{Entry, GradStats, Measurements, Residency};

/// Gradients, each with its values.
pub(super) struct GradNorms(Vec<(Tensor, Vec<f64>)>);

pub(super) fn measured(gradients: &[&[f64]]) -> GradNorms {
    let one = |values: &&[f64]| {
        let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap();
        (tensor, values.to_vec())
    };
    GradNorms(gradients.iter().map(one).collect())
}

impl GradNorms {
    pub(super) fn of(&self) -> Measurements<'_> {
        let norm_type = NormType::L2;
        let mut total = GradStats::ZERO;
        let mut entries = Vec::new();
        for (tensor, values) in &self.0 {
            let stats = measure(values, norm_type);
            total.stats = total.stats.merge(stats, norm_type);
            entries.push(Entry {
                grad: Some(tensor),
                residency: Residency::Cpu,
                elements: values.len(),
                storage: 0,
                measured: GradStats {
                    stats,
                    ..GradStats::ZERO
                },
            });
        }
        Measurements {
            entries,
            total,
            norm_type,
            units: None,
            loss: None,
        }
    }
}

pub(super) fn given<'a>(measured: &'a Measurements<'a>, eps: f64) -> Given<'a> {
    Given {
        measured,
        eps,
        zero_non_finite: false,
    }
}

/// The rule's decision for one gradient with this norm, and this loss.
pub(super) fn decide(rule: &mut dyn Rule, norm: f64, loss: Option<f64>) -> Decision {
    let measured = measured(&[&[norm]]);
    let measured = Measurements {
        loss,
        ..measured.of()
    };
    rule.decide(&given(&measured, CLIP_EPS))
}

/// The same, then takes the step.
pub(super) fn step(rule: &mut dyn Rule, norm: f64, loss: Option<f64>) -> Decision {
    let decision = decide(rule, norm, loss);
    rule.observe();
    decision
}
