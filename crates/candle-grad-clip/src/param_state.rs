//! The optimizer state of one Var (its moments and its f32 master copy), and the update rule.

use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip_kernels::{AdamW, BLOCK, Sgd, Wide, WideVec};

use crate::error::Result;
use crate::tensors::wide_dtype;

/// The update rule of a step, with its numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StepRule {
    AdamW(AdamW),
    Sgd(Sgd),
}

impl StepRule {
    /// The rule for a Var that has taken `taken` steps.
    #[inline]
    pub(crate) fn of(mut self, taken: u64) -> Self {
        match &mut self {
            Self::AdamW(adamw) => adamw.step = taken + 1,
            Self::Sgd(sgd) => sgd.is_first = taken == 0,
        }
        self
    }
}

/// Which arrays of a Var's shape an optimizer keeps.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StateLayout {
    /// Number of moment arrays.
    pub(crate) moments: usize,
    /// Whether half-precision Vars have a copy in f32, after the moments.
    pub(crate) master_weights: bool,
}

/// The distance between the starts of a Var's arrays, in elements, for a Var with `len` elements.
///
/// Large arrays are padded. With sizes that are powers of two, moments, gradient and parameter
/// would map to the same DRAM bank or cache set. Four streams that evict each other took 2.7 times
/// as long (64 Mi elements, AMD EPYC VM, `cargo run --release -p bench -- --sets A`, 2026-11-24).
#[inline]
pub(crate) fn stride(len: usize) -> usize {
    const ROOM: usize = 272; // not a multiple of a page, since large allocations start at pages
    if len > BLOCK { len + ROOM } else { len }
}

/// The arrays of `len` elements in the values of [`State::Host`].
pub(crate) fn arrays<W>(values: &[W], len: usize) -> impl Iterator<Item = &[W]> {
    let arrays = values.chunks_exact(stride(len).max(1));
    arrays.map(move |array| &array[..len])
}

/// Like [`arrays`], but mutable.
#[inline]
pub(crate) fn arrays_mut<W>(values: &mut [W], len: usize) -> impl Iterator<Item = &mut [W]> {
    let arrays = values.chunks_exact_mut(stride(len).max(1));
    arrays.map(move |array| &mut array[..len])
}

/// The arrays of one Var, in f32, or in f64 for f64 Vars.
#[derive(Debug, Clone)]
pub(crate) enum State {
    /// No step was taken yet: the moments are zero, and the copy is the Var itself.
    Fresh,
    /// On CPU: one array after the other, [`stride`] apart.
    Host(WideVec),
    /// On another device: one tensor per array.
    Device(Vec<Tensor>),
}

impl StateLayout {
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

    #[inline]
    pub(crate) fn has_master(self, dtype: DType) -> bool {
        self.master_weights && matches!(dtype, DType::F16 | DType::BF16)
    }

    /// How many arrays a Var of this dtype has.
    fn arrays(self, dtype: DType) -> usize {
        self.moments + usize::from(self.has_master(dtype))
    }
}

impl State {
    /// The state before the first step, as arrays on the Var's device.
    pub(crate) fn start(var: &Var, layout: StateLayout) -> Result<Self> {
        let dtype = wide_dtype(var.dtype());
        if !var.device().is_cpu() {
            let mut arrays = Vec::new();
            for _ in 0..layout.moments {
                arrays.push(Tensor::zeros(var.shape(), dtype, var.device())?);
            }
            if layout.has_master(var.dtype()) {
                arrays.push(var.as_detached_tensor().to_dtype(dtype)?);
            }
            return Ok(Self::Device(arrays));
        }
        let len = layout.arrays(var.dtype()) * stride(var.elem_count());
        if dtype == DType::F64 {
            return Ok(Self::Host(WideVec::F64(vec![0.0; len])));
        }
        let mut values = vec![0.0; len];
        if layout.has_master(var.dtype())
            && let Some(master) = arrays_mut(&mut values, var.elem_count()).last()
        {
            let now = var.as_detached_tensor().to_dtype(dtype)?.flatten_all()?;
            master.copy_from_slice(&now.to_vec1::<f32>()?);
        }
        Ok(Self::Host(WideVec::F32(values)))
    }

    /// The arrays as tensors with the shape of `var`, on the state's device. None before the first
    /// step.
    pub(crate) fn to_tensors(&self, var: &Var) -> Result<Vec<Tensor>> {
        match self {
            Self::Fresh => Ok(Vec::new()),
            Self::Device(arrays) => Ok(arrays.clone()),
            Self::Host(WideVec::F32(values)) => tensors(values, var),
            Self::Host(WideVec::F64(values)) => tensors(values, var),
        }
    }

    /// The state with these arrays, which are on the device of `var`.
    pub(crate) fn from_tensors(var: &Var, arrays: Vec<Tensor>) -> Result<Self> {
        if !var.device().is_cpu() {
            return Ok(Self::Device(arrays));
        }
        Ok(Self::Host(host_values(&arrays)?))
    }
}

/// The numbers of f32 or f64 arrays, in the layout of [`State::Host`].
pub(crate) fn host_values(arrays: &[Tensor]) -> Result<WideVec> {
    if arrays.first().map(Tensor::dtype) == Some(DType::F64) {
        return Ok(WideVec::F64(values(arrays)?));
    }
    Ok(WideVec::F32(values(arrays)?))
}

fn tensors<W: Wide + candle_core::WithDType>(values: &[W], var: &Var) -> Result<Vec<Tensor>> {
    let tensor = |array| Ok(Tensor::from_slice(array, var.shape(), &Device::Cpu)?);
    arrays(values, var.elem_count()).map(tensor).collect()
}

fn values<W: Wide + candle_core::WithDType>(arrays: &[Tensor]) -> Result<Vec<W>> {
    let mut values = Vec::new();
    for array in arrays {
        values.extend(array.flatten_all()?.to_vec1::<W>()?);
        let room = stride(array.elem_count()) - array.elem_count();
        values.resize(values.len() + room, W::default());
    }
    Ok(values)
}
