//! Clip and step: each rival's optimizer.

use anyhow::Result;
use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_grad_clip::{Clip, ClippedOptimizer, NonFinite, optim};
use candle_nn::Optimizer;

use crate::op::{Impl, LR, Op, params_adamw};
use crate::paste_in;

/// Clips the gradients by their global norm, takes a step, and returns the norm.
pub(crate) trait Step {
    fn step(&mut self, grads: &mut GradStore) -> Result<f64>;
}

/// What `rival` needs to do `op` to `vars`; none where that is no step.
pub(crate) fn stepper(
    rival: Impl,
    op: Op,
    vars: &[Var],
    max_norm: f64,
) -> Result<Option<Box<dyn Step>>> {
    let vars = vars.to_vec();
    Ok(Some(match (rival, op) {
        (Impl::CandleGradClip, Op::ClipAdamW) => {
            clipped::<optim::AdamW>(vars, params_adamw(), max_norm)?
        }
        (Impl::CandleGradClip, Op::ClipSgd) => clipped::<optim::Sgd>(vars, LR.into(), max_norm)?,
        (Impl::PasteIn, Op::ClipAdamW) => {
            pasted::<candle_nn::AdamW>(vars, params_adamw(), max_norm)?
        }
        (Impl::PasteIn, Op::ClipSgd) => pasted::<candle_nn::SGD>(vars, LR, max_norm)?,
        _ => return Ok(None),
    }))
}

/// Users take these steps with `backward_step`. A store that is lent gives the same path: nothing is copied.
struct Clipped<O: Optimizer>(ClippedOptimizer<O>);

fn clipped<O: Optimizer + 'static>(
    vars: Vec<Var>,
    config: O::Config,
    max_norm: f64,
) -> Result<Box<dyn Step>> {
    let clip = Clip::norm(max_norm).non_finite(NonFinite::Error);
    let inner = O::new(vars.clone(), config)?;
    Ok(Box::new(Clipped(ClippedOptimizer::wrap(
        inner, vars, clip,
    )?)))
}

impl<O: Optimizer + 'static> Step for Clipped<O> {
    fn step(&mut self, grads: &mut GradStore) -> Result<f64> {
        Ok(self.0.step_report(grads)?.total_norm()?)
    }
}

struct Pasted<O> {
    inner: O,
    vars: Vec<Var>,
    max_norm: f64,
}

fn pasted<O: Optimizer + 'static>(
    vars: Vec<Var>,
    config: O::Config,
    max_norm: f64,
) -> Result<Box<dyn Step>> {
    let inner = O::new(vars.clone(), config)?;
    Ok(Box::new(Pasted {
        inner,
        vars,
        max_norm,
    }))
}

impl<O: Optimizer> Step for Pasted<O> {
    fn step(&mut self, grads: &mut GradStore) -> Result<f64> {
        let norm = paste_in::clip_grad_norm(grads, &self.vars, self.max_norm)?;
        self.inner.step(grads)?;
        Ok(norm)
    }
}
