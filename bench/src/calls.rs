//! What is timed of each rival of this program but the floor, and the norm it finds.

use anyhow::Result;
use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_grad_clip::{Clip, ClippedOptimizer, NonFinite, NormType, StepReport, optim};
use candle_nn::Optimizer;

use crate::op::{CLIP_VALUE, Impl, LR, Op, params_adamw};
use crate::paste_in;

/// A norm that may still be on a GPU.
#[allow(clippy::large_enum_variant)] // a box would be timed
pub(crate) enum Norm {
    NotMeasured,
    Read(f64),
    Reported(StepReport),
}

impl Norm {
    /// Waits for it.
    pub(crate) fn value(self) -> Result<Option<f64>> {
        Ok(match self {
            Self::NotMeasured => None,
            Self::Read(norm) => Some(norm),
            Self::Reported(report) => Some(report.total_norm()?),
        })
    }
}

/// One call.
pub(crate) type Call = Box<dyn FnMut(&mut GradStore) -> Result<Norm>>;

/// What `rival` does to `vars` and their gradients; none for the floor.
pub(crate) fn call(rival: Impl, op: Op, vars: &[Var], max_norm: f64) -> Result<Option<Call>> {
    let vars = vars.to_vec();
    Ok(Some(match rival {
        Impl::CandleGradClip => ours(op, vars, max_norm)?,
        Impl::PasteIn => pasted(op, vars, max_norm)?,
        Impl::Floor => return Ok(None),
        #[cfg(feature = "cuda")]
        Impl::StepAlone => {
            let mut sgd = optim::Sgd::new(vars, LR.into())?;
            Box::new(move |grads| {
                sgd.step(grads)?;
                Ok(Norm::NotMeasured)
            })
        }
    }))
}

fn ours(op: Op, vars: Vec<Var>, max_norm: f64) -> Result<Call> {
    let mut clip = Clip::norm(max_norm);
    if vars.iter().all(|var| var.device().is_cpu()) {
        // On a GPU it would wait for the norm.
        clip = clip.non_finite(NonFinite::Error);
    }
    Ok(match op {
        Op::TotalNorm => Box::new(move |grads| {
            let norm = candle_grad_clip::total_norm(grads, &vars, NormType::L2)?;
            Ok(Norm::Read(norm))
        }),
        Op::ClipGradNorm | Op::ClipGradNormNoop => Box::new(move |grads| {
            let norm = candle_grad_clip::clip_grad_norm(grads, &vars, max_norm)?;
            Ok(Norm::Read(norm))
        }),
        Op::ClipGradValue => Box::new(move |grads| {
            candle_grad_clip::clip_grad_value(grads, &vars, CLIP_VALUE)?;
            Ok(Norm::NotMeasured)
        }),
        Op::ClipAdamW => clipped::<optim::AdamW>(vars, params_adamw(), clip)?,
        Op::ClipSgd => clipped::<optim::Sgd>(vars, LR.into(), clip)?,
        #[cfg(feature = "cuda")]
        Op::NoneSgd => clipped::<optim::Sgd>(vars, LR.into(), Clip::none())?,
    })
}

/// Users take these steps with `backward_step`. A store that is lent gives the same path: nothing
/// is copied.
fn clipped<O: Optimizer + 'static>(vars: Vec<Var>, config: O::Config, clip: Clip) -> Result<Call> {
    let inner = O::new(vars.clone(), config)?;
    let mut opt = ClippedOptimizer::wrap(inner, vars, clip)?;
    Ok(Box::new(move |grads| {
        Ok(Norm::Reported(opt.step_report(grads)?))
    }))
}

/// What users of candle paste, and candle's optimizers.
fn pasted(op: Op, vars: Vec<Var>, max_norm: f64) -> Result<Call> {
    Ok(match op {
        Op::TotalNorm => Box::new(move |grads| Ok(Norm::Read(paste_in::total_norm(grads, &vars)?))),
        Op::ClipGradNorm | Op::ClipGradNormNoop => Box::new(move |grads| {
            let norm = paste_in::clip_grad_norm(grads, &vars, max_norm)?;
            Ok(Norm::Read(norm))
        }),
        Op::ClipGradValue => Box::new(move |grads| {
            paste_in::clip_grad_value(grads, &vars, CLIP_VALUE)?;
            Ok(Norm::NotMeasured)
        }),
        Op::ClipAdamW => pasted_step::<candle_nn::AdamW>(vars, params_adamw(), max_norm)?,
        Op::ClipSgd => pasted_step::<candle_nn::SGD>(vars, LR, max_norm)?,
        // An infinite limit measures only.
        #[cfg(feature = "cuda")]
        Op::NoneSgd => pasted_step::<candle_nn::SGD>(vars, LR, f64::INFINITY)?,
    })
}

fn pasted_step<O: Optimizer + 'static>(
    vars: Vec<Var>,
    config: O::Config,
    max_norm: f64,
) -> Result<Call> {
    let mut inner = O::new(vars.clone(), config)?;
    Ok(Box::new(move |grads| {
        let norm = paste_in::clip_grad_norm(grads, &vars, max_norm)?;
        inner.step(grads)?;
        Ok(Norm::Read(norm))
    }))
}
