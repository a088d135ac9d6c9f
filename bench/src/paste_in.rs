//! What users paste today, as candle has no clipping: its tensor operations, a Var at a time.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Var};

/// The L2 norm, a tensor at a time. Half types are widened first, or their sums stop at 256.
pub(crate) fn total_norm(grads: &GradStore, vars: &[Var]) -> Result<f64> {
    let mut sum = 0f64;
    for var in vars {
        let Some(grad) = grads.get(var) else { continue };
        sum += match grad.dtype() {
            DType::F64 => grad.sqr()?.sum_all()?.to_scalar::<f64>()?,
            DType::F32 => grad.sqr()?.sum_all()?.to_scalar::<f32>()?.into(),
            _ => {
                let wide = grad.to_dtype(DType::F32)?;
                wide.sqr()?.sum_all()?.to_scalar::<f32>()?.into()
            }
        };
    }
    Ok(sum.sqrt())
}

/// Multiplies what is too long, as the better ones of these snippets do.
pub(crate) fn clip_grad_norm(grads: &mut GradStore, vars: &[Var], max_norm: f64) -> Result<f64> {
    let total_norm = total_norm(grads, vars)?;
    let clip_coef = max_norm / (total_norm + 1e-6);
    if clip_coef < 1.0 {
        for var in vars {
            let Some(grad) = grads.get(var) else { continue };
            let clipped = (grad * clip_coef)?;
            grads.insert(var, clipped);
        }
    }
    Ok(total_norm)
}

/// candle's `clamp`, a tensor at a time.
pub(crate) fn clip_grad_value(grads: &mut GradStore, vars: &[Var], clip_value: f64) -> Result<()> {
    for var in vars {
        let Some(grad) = grads.get(var) else { continue };
        let clipped = grad.clamp(-clip_value, clip_value)?;
        grads.insert(var, clipped);
    }
    Ok(())
}
