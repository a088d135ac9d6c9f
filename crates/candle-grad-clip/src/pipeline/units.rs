//! Measures by units: the norm of each row or column of each gradient and of its Var's value.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_grad_clip_kernels::{BLOCK, NormType, Stats, Units};

use crate::backend;
use crate::error::Result;
use crate::gradients::{
    Entry, GradStats, MeasuredUnits, Measurements, Residency, UnitPlan, route_cuda_to_candle_ops,
};
use crate::pipeline::measure::walk;
use crate::threads::{Work, for_each, for_each_large};
use crate::vars::VarList;

/// Tensors per task.
const JOBS_PER_TASK: usize = 64;

/// Collects the gradients of `vars` and measures their units, divided by `scale`.
pub(crate) fn measure_units<'g>(
    vars: VarList<'_>,
    grads: &'g GradStore,
    norm_type: NormType,
    plan: &Arc<UnitPlan>,
    scale: f64,
) -> Result<Measurements<'g>> {
    let mut entries = route_cuda_to_candle_ops(walk(vars, grads, None)?);
    let mut measured = MeasuredUnits {
        plan: plan.clone(),
        grads: vec![Stats::ZERO; plan.total()],
        weights: vec![Stats::ZERO; plan.total()],
    };
    measure_all(vars.vars, vars.work, &entries, norm_type, &mut measured)?;
    for stats in &mut measured.grads {
        stats.power.scale /= scale;
    }
    let mut total = Stats::ZERO;
    for (index, entry) in entries.iter_mut().enumerate() {
        let units = measured.grads[plan.range(index)].iter();
        let stats = units.fold(Stats::ZERO, |sum, unit| sum.merge(*unit, norm_type));
        entry.measured.stats = stats;
        total = total.merge(stats, norm_type);
    }
    Ok(Measurements {
        entries,
        total: GradStats {
            stats: total,
            ..GradStats::ZERO
        },
        norm_type,
        units: Some(measured),
        loss: None,
    })
}

/// A tensor to measure, and the destination of its results.
struct Job<'a> {
    tensor: &'a Tensor,
    units: Units,
    stats: &'a mut [Stats],
}

impl Job<'_> {
    fn is_large(&self) -> bool {
        self.tensor.elem_count() > BLOCK
    }

    fn run(&mut self, norm_type: NormType) -> Result<()> {
        backend::cpu::measure_units(self.tensor, self.units, norm_type, self.stats)
    }
}

fn measure_all(
    vars: &[Var],
    work: Work,
    entries: &[Entry<'_>],
    norm_type: NormType,
    measured: &mut MeasuredUnits,
) -> Result<()> {
    let plan = &measured.plan;
    let (mut grads, mut weights) = (&mut measured.grads[..], &mut measured.weights[..]);
    let (mut here, mut elsewhere) = (Vec::with_capacity(2 * vars.len()), Vec::new());
    for (index, entry) in entries.iter().enumerate() {
        let units = plan.range(index).len();
        let of_grad = grads.split_off_mut(..units).unwrap_or_default();
        let of_weights = weights.split_off_mut(..units).unwrap_or_default();
        let Some(grad) = entry.grad.filter(|_| entry.elements > 0) else {
            continue;
        };
        let mut push = |tensor, stats| {
            let units = plan.units(index);
            if entry.residency == Residency::Elsewhere {
                elsewhere.push((tensor, units, stats));
            } else {
                here.push(Job {
                    tensor,
                    units,
                    stats,
                });
            }
        };
        push(grad, of_grad);
        if !plan.is_excluded(index) {
            push(vars[index].as_tensor(), of_weights);
        }
    }
    for_each(work, here.chunks_mut(JOBS_PER_TASK), |jobs| {
        let mut small = jobs.iter_mut().filter(|job| !job.is_large());
        small.try_for_each(|job| job.run(norm_type))
    })?;
    let large = here.iter_mut().filter(|job| job.is_large());
    for_each_large(work, large, |job| job.run(norm_type))?;
    backend::candle_ops::measure_units(elsewhere, norm_type)
}
