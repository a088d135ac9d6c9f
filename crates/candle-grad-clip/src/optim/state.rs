//! What an optimizer keeps for one Var: its moments, and its value in full precision.

use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip_kernels::{Wide, WideVec};

use crate::Result;

/// Which arrays of a Var's shape an optimizer keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kept {
    /// Arrays of moments.
    pub(crate) moments: usize,
    /// Whether half-precision Vars have a copy in f32, behind the moments.
    pub(crate) master_weights: bool,
}

/// The arrays of one Var, in f32, or in f64 for f64 Vars.
#[derive(Debug, Clone)]
pub(crate) enum State {
    /// No step was taken yet: moments are zero, the copy is the Var itself.
    Fresh,
    /// On CPU: one array behind the other.
    Host(WideVec),
    /// On another device: a tensor an array.
    Device(Vec<Tensor>),
}

impl Kept {
    pub(crate) fn adamw(amsgrad: bool, master_weights: bool) -> Self {
        Self {
            moments: if amsgrad { 3 } else { 2 },
            master_weights,
        }
    }

    pub(crate) fn sgd(momentum: f64, master_weights: bool) -> Self {
        Self {
            moments: usize::from(momentum != 0.0),
            master_weights,
        }
    }

    pub(crate) fn has_master(self, dtype: DType) -> bool {
        self.master_weights && matches!(dtype, DType::F16 | DType::BF16)
    }
}

/// The dtype of the arrays of a Var.
pub(crate) fn wide_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

impl State {
    /// The state before the first step, as arrays where the Var is.
    pub(crate) fn start(var: &Var, kept: Kept) -> Result<Self> {
        let dtype = wide_dtype(var.dtype());
        if !var.device().is_cpu() {
            let mut arrays = Vec::new();
            for _ in 0..kept.moments {
                arrays.push(Tensor::zeros(var.shape(), dtype, var.device())?);
            }
            if kept.has_master(var.dtype()) {
                arrays.push(var.as_detached_tensor().to_dtype(dtype)?);
            }
            return Ok(Self::Device(arrays));
        }
        let len = kept.moments * var.elem_count();
        if dtype == DType::F64 {
            return Ok(Self::Host(WideVec::F64(vec![0.0; len])));
        }
        let mut values = vec![0.0; len];
        if kept.has_master(var.dtype()) {
            let master = var.as_detached_tensor().to_dtype(dtype)?.flatten_all()?;
            values.extend(master.to_vec1::<f32>()?);
        }
        Ok(Self::Host(WideVec::F32(values)))
    }

    /// The arrays as tensors shaped as `var` is, where it is; none before the first step.
    pub(crate) fn to_tensors(&self, var: &Var) -> Result<Vec<Tensor>> {
        match self {
            Self::Fresh => Ok(Vec::new()),
            Self::Device(arrays) => Ok(arrays.clone()),
            Self::Host(WideVec::F32(values)) => tensors(values, var),
            Self::Host(WideVec::F64(values)) => tensors(values, var),
        }
    }

    /// The state with these arrays, kept where `var` is.
    pub(crate) fn from_tensors(var: &Var, arrays: Vec<Tensor>) -> Result<Self> {
        if !var.device().is_cpu() {
            return Ok(Self::Device(arrays));
        }
        Ok(Self::Host(host_values(&arrays)?))
    }
}

/// The numbers of arrays of one of the two dtypes, one array behind the other.
pub(crate) fn host_values(arrays: &[Tensor]) -> Result<WideVec> {
    if arrays.first().map(Tensor::dtype) == Some(DType::F64) {
        return Ok(WideVec::F64(values(arrays)?));
    }
    Ok(WideVec::F32(values(arrays)?))
}

fn tensors<W: Wide + candle_core::WithDType>(values: &[W], var: &Var) -> Result<Vec<Tensor>> {
    let elements = var.elem_count().max(1);
    let arrays = values.chunks_exact(elements);
    let tensor = |array| Ok(Tensor::from_slice(array, var.shape(), &Device::Cpu)?);
    arrays.map(tensor).collect()
}

fn values<W: Wide + candle_core::WithDType>(arrays: &[Tensor]) -> Result<Vec<W>> {
    let mut values = Vec::new();
    for array in arrays {
        values.extend(array.flatten_all()?.to_vec1::<W>()?);
    }
    Ok(values)
}
