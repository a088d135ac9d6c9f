//! What each rival does in a call, and the norm it found, which is read when the clock has stopped.

use anyhow::Result;
use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_grad_clip::{Clip, ClippedOptimizer, NormType, StepReport, optim};
use candle_nn::Optimizer;

use crate::cuda::task::Task;
use crate::op::{LR, params_adamw};
use crate::paste_in;

/// A norm that may still be on the GPU.
pub(crate) enum Norm {
    NotMeasured,
    Read(f64),
    Reported(StepReport),
}

impl Norm {
    /// Waits for it.
    pub(crate) fn value(&self) -> Result<Option<f64>> {
        Ok(match self {
            Self::NotMeasured => None,
            Self::Read(norm) => Some(*norm),
            Self::Reported(report) => Some(report.total_norm()?),
        })
    }
}

/// What is timed of a rival.
pub(crate) type Call = Box<dyn FnMut(&mut GradStore) -> Result<Norm>>;

/// Of the library's users.
pub(crate) fn ours(task: Task, vars: Vec<Var>, max_norm: f64) -> Result<Call> {
    Ok(match task {
        Task::TotalNorm => Box::new(move |grads| {
            let norm = candle_grad_clip::total_norm(grads, &vars, NormType::L2)?;
            Ok(Norm::Read(norm))
        }),
        Task::ClipGradNorm => Box::new(move |grads| {
            let norm = candle_grad_clip::clip_grad_norm(grads, &vars, max_norm)?;
            Ok(Norm::Read(norm))
        }),
        Task::ClipAdamW => clipped::<optim::AdamW>(vars, params_adamw(), Clip::norm(max_norm))?,
        Task::ClipSgd => clipped::<optim::Sgd>(vars, LR.into(), Clip::norm(max_norm))?,
        Task::NoneSgd => clipped::<optim::Sgd>(vars, LR.into(), Clip::none())?,
    })
}

/// The step of [`Task::NoneSgd`] without the norm.
pub(crate) fn step_alone(vars: Vec<Var>) -> Result<Call> {
    let mut sgd = optim::Sgd::new(vars, LR.into())?;
    Ok(Box::new(move |grads| {
        sgd.step(grads)?;
        Ok(Norm::NotMeasured)
    }))
}

/// What users of candle paste, and candle's optimizers.
pub(crate) fn pasted(task: Task, vars: Vec<Var>, max_norm: f64) -> Result<Call> {
    Ok(match task {
        Task::TotalNorm => {
            Box::new(move |grads| Ok(Norm::Read(paste_in::total_norm(grads, &vars)?)))
        }
        Task::ClipGradNorm => Box::new(move |grads| {
            let norm = paste_in::clip_grad_norm(grads, &vars, max_norm)?;
            Ok(Norm::Read(norm))
        }),
        Task::ClipAdamW => {
            let inner = candle_nn::AdamW::new(vars.clone(), params_adamw())?;
            pasted_step(inner, vars, max_norm)
        }
        Task::ClipSgd | Task::NoneSgd => {
            let inner = candle_nn::SGD::new(vars.clone(), LR)?;
            pasted_step(inner, vars, max_norm)
        }
    })
}

fn clipped<O: Optimizer + 'static>(vars: Vec<Var>, config: O::Config, clip: Clip) -> Result<Call> {
    let inner = O::new(vars.clone(), config)?;
    let mut opt = ClippedOptimizer::wrap(inner, vars, clip)?;
    Ok(Box::new(move |grads| {
        Ok(Norm::Reported(opt.step_report(grads)?))
    }))
}

fn pasted_step<O: Optimizer + 'static>(mut inner: O, vars: Vec<Var>, max_norm: f64) -> Call {
    Box::new(move |grads| {
        // An infinite limit measures only.
        let norm = paste_in::clip_grad_norm(grads, &vars, max_norm)?;
        inner.step(grads)?;
        Ok(Norm::Read(norm))
    })
}

/// The bytes that a rival's step takes beside parameters and gradients, roughly: moments, clipped gradients and
/// temporaries of the largest tensor.
pub(crate) fn bytes_of_pasted(task: Task, params: usize, largest: usize) -> usize {
    match task {
        Task::TotalNorm => 2 * largest,
        Task::ClipGradNorm | Task::ClipSgd | Task::NoneSgd => params + 3 * largest,
        Task::ClipAdamW => 3 * params + 12 * largest,
    }
}

/// The same of ours: the moments, which are f32.
pub(crate) fn bytes_of_ours(task: Task, elements: usize) -> usize {
    match task {
        Task::ClipAdamW => 2 * size_of::<f32>() * elements,
        _ => 0,
    }
}
