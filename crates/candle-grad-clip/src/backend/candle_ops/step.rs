//! Optimizer steps with candle's tensor operations, by the same equations as the kernels' `AdamW`
//! and `Sgd`.

use candle_core::{DType, Tensor, Var};
use candle_grad_clip_kernels::{AdamW, GradEdit, Sgd, Wide};

use super::edit::edit_wide;
use super::tensor_ops::times;
use crate::error::Result;
use crate::param_state::{State, StateLayout, StepRule};
use crate::tensors::wide_dtype;

/// The new values of a Var and its state.
#[derive(Debug)]
pub(crate) struct Stepped {
    pub(crate) param: Tensor,
    pub(crate) state: State,
}

/// Computes a step without changing anything. `is_finite` says whether all elements of the gradient
/// are finite.
pub(crate) fn step(
    var: &Var,
    grad: &Tensor,
    state: &State,
    layout: StateLayout,
    edit: GradEdit<'_>,
    rule: StepRule,
    is_finite: bool,
) -> Result<Stepped> {
    let mut arrays = match state {
        State::Fresh => State::start(var, layout)?.to_tensors(var)?,
        _ => state.to_tensors(var)?,
    };
    let grad = edit_wide(grad, edit, is_finite)?;
    let has_master = layout.has_master(var.dtype());
    let param = match arrays.last() {
        Some(master) if has_master => renewed(master, var)?,
        _ => var.as_detached_tensor().to_dtype(wide_dtype(var.dtype()))?,
    };
    let next = match rule {
        StepRule::AdamW(rule) => adamw(&param, &grad, &mut arrays[..layout.moments], rule)?,
        StepRule::Sgd(rule) => sgd(&param, &grad, &mut arrays[..layout.moments], rule)?,
    };
    if let Some(master) = arrays.last_mut().filter(|_| has_master) {
        *master = next.clone();
    }
    Ok(Stepped {
        param: next.to_dtype(var.dtype())?,
        state: State::from_tensors(var, arrays)?,
    })
}

/// The master weights. Where the master no longer rounds to the Var, the caller has set the Var, so
/// its value is used instead.
fn renewed(master: &Tensor, var: &Var) -> Result<Tensor> {
    let var = var.as_detached_tensor();
    let is_same = master.to_dtype(var.dtype())?.eq(&var)?;
    Ok(is_same.where_cond(master, &var.to_dtype(master.dtype())?)?)
}

fn adamw(param: &Tensor, grad: &Tensor, moments: &mut [Tensor], rule: AdamW) -> Result<Tensor> {
    let AdamW {
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        ..
    } = rule;
    let eps = match param.dtype() {
        DType::F64 => eps.max(<f64 as Wide>::SMALLEST_EPS),
        _ => eps.max(<f32 as Wide>::SMALLEST_EPS),
    };
    moments[0] = (times(&moments[0], beta1)? + times(grad, 1.0 - beta1)?)?;
    moments[1] = (times(&moments[1], beta2)? + times(&grad.sqr()?, 1.0 - beta2)?)?;
    let mut second = moments[1].clone();
    if let Some(largest) = moments.get_mut(2) {
        // Not `maximum`: devices differ in how it treats NaN. Metal's fast math may get a comparison
        // with NaN wrong too. That does no harm: the host checks the gradient, so a NaN got here only
        // under `Propagate`, and then the first moment makes the weight NaN.
        second = largest.gt(&second)?.where_cond(largest, &second)?;
        *largest = second.clone();
    }
    let m_hat = times(&moments[0], rule.scale(beta1))?;
    let v_hat = times(&second, rule.scale(beta2))?;
    let decayed = times(param, 1.0 - lr * weight_decay)?;
    Ok((decayed - times(&(m_hat / (v_hat.sqrt()? + eps)?)?, lr)?)?)
}

fn sgd(param: &Tensor, grad: &Tensor, moments: &mut [Tensor], rule: Sgd) -> Result<Tensor> {
    let mut direction = grad.clone();
    if rule.weight_decay != 0.0 {
        direction = (direction + times(param, rule.weight_decay)?)?;
    }
    if let Some(buffer) = moments.first_mut() {
        if rule.is_first {
            // A copy, since the direction can be the caller's gradient.
            *buffer = direction.force_contiguous()?;
        } else {
            *buffer = (times(buffer, rule.momentum)? + times(&direction, 1.0 - rule.dampening)?)?;
        }
        direction = if rule.nesterov {
            (direction + times(buffer, rule.momentum)?)?
        } else {
            buffer.clone()
        };
    }
    Ok((param - times(&direction, rule.lr)?)?)
}
