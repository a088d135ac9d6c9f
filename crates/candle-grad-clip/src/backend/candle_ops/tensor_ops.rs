//! Small operations on tensors of any device.

use candle_core::{DType, Device, Tensor};
use candle_grad_clip_kernels::Edit;

use crate::backend::cpu;
use crate::error::Result;
use crate::tensors::wide_dtype;
use crate::threads::{Work, run};

/// Widens to f32; keeps f64 (Metal has no f64).
pub(super) fn wide(grad: &Tensor) -> Result<Tensor> {
    let dtype = wide_dtype(grad.dtype());
    Ok(grad.detach().to_dtype(dtype)?.contiguous()?)
}

/// `x * factor`. candle adds 0 to the product, which turns -0 into 0; adding -0 changes nothing.
pub(super) fn times(x: &Tensor, factor: f64) -> Result<Tensor> {
    Ok(x.affine(factor, -0.0)?)
}

/// A tensor with `like`'s dtype, on its device. (Metal has no f64.)
pub(super) fn wide_tensor(
    values: Vec<f64>,
    shape: (usize, usize),
    like: &Tensor,
) -> Result<Tensor> {
    Ok(if like.dtype() == DType::F64 {
        Tensor::from_vec(values, shape, like.device())?
    } else {
        let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
        Tensor::from_vec(values, shape, like.device())?
    })
}

/// A tensor without elements: candle's operations fail on those on CUDA.
pub(super) fn none(like: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::zeros(like.shape(), dtype, like.device())?)
}

/// A copy on CPU that no other thread can reach.
pub(super) fn on_cpu(tensor: &Tensor) -> Result<Tensor> {
    let copy = tensor.detach().force_contiguous()?;
    Ok(copy.to_device(&Device::Cpu)?)
}

/// Sets the non-finite elements of a CPU tensor to 0, and copies it to a device.
pub(super) fn zeroed(here: &Tensor, device: &Device) -> Result<Tensor> {
    let zero = Edit::Scale {
        clip_coef: 1.0,
        zero_non_finite: true,
    };
    run(Work::of_elements(here.elem_count()), || {
        cpu::edit_in_place(here, zero.into())
    })?;
    Ok(here.to_device(device)?)
}
