//! The data that the stages exchange: the gradients of the Vars and their measurements.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use candle_grad_clip_kernels::{Norm, NormType, Stats, Units};

/// Where a gradient is, and whether it can be edited in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Residency {
    /// Read and written by the CPU kernels.
    Cpu,
    /// On CPU, but not contiguous, or itself a Var: edits go to a copy.
    CpuCopied,
    /// Read and written by the CUDA kernels.
    Cuda,
    /// As `CpuCopied`, on an NVIDIA GPU.
    CudaCopied,
    /// Handled by candle's operations only.
    Elsewhere,
}

impl Residency {
    #[inline]
    pub(crate) fn is_cpu(self) -> bool {
        matches!(self, Self::Cpu | Self::CpuCopied)
    }

    #[inline]
    pub(crate) fn is_cuda(self) -> bool {
        matches!(self, Self::Cuda | Self::CudaCopied)
    }

    /// Whether a gradient that shares its storage with no other can be edited in place.
    #[inline]
    pub(crate) fn is_in_place(self) -> bool {
        matches!(self, Self::Cpu | Self::Cuda)
    }
}

/// The options of a measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Request {
    pub(crate) norm_type: NormType,
    /// Also measure the gradients as if clamped to this value.
    pub(crate) clip_value: Option<f64>,
    /// In the clamped measurement non-finite elements count as 0, not as the bound or NaN.
    pub(crate) zero_non_finite: bool,
}

impl Request {
    /// Only the norm.
    pub(crate) fn norm(norm_type: NormType) -> Self {
        Self {
            norm_type,
            clip_value: None,
            zero_non_finite: false,
        }
    }
}

/// The measurements of one gradient, from one read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GradStats {
    pub(crate) stats: Stats,
    /// The measurement after clamping to [`Request::clip_value`].
    pub(crate) clamped: Stats,
    /// The number of elements that clamping changes.
    pub(crate) num_clipped: u64,
}

impl GradStats {
    /// The measurements of the gradient divided by `scale`, a power of two, so this is exact.
    #[inline]
    pub(crate) fn unscaled(mut self, scale: f64) -> Self {
        self.stats.power.scale /= scale;
        self.clamped.power.scale /= scale;
        self
    }

    pub(crate) const ZERO: Self = Self {
        stats: Stats::ZERO,
        clamped: Stats::ZERO,
        num_clipped: 0,
    };

    #[inline]
    pub(crate) fn merge(self, other: Self, norm_type: NormType) -> Self {
        Self {
            stats: self.stats.merge(other.stats, norm_type),
            clamped: self.clamped.merge(other.clamped, norm_type),
            num_clipped: self.num_clipped + other.num_clipped,
        }
    }
}

/// The gradient of one Var, if there is one.
///
/// Later stages read these fields rather than the tensor, which would cost a cache miss or two per
/// tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'g> {
    pub(crate) grad: Option<&'g Tensor>,
    pub(crate) residency: Residency,
    pub(crate) elements: usize,
    /// The address of the storage: equal for tensors that share it. Unknown for
    /// [`Residency::Elsewhere`].
    pub(crate) storage: usize,
    pub(crate) measured: GradStats,
}

impl Entry<'_> {
    pub(crate) const EMPTY: Self = Self {
        grad: None,
        residency: Residency::Elsewhere,
        elements: 0,
        storage: 0,
        measured: GradStats::ZERO,
    };

    /// Whether all elements are finite, if the gradient was measured.
    #[inline]
    pub(crate) fn is_finite(&self) -> bool {
        self.measured.stats.non_finite() == 0
    }
}

/// The gradients of some Vars, in the order of the Vars, with their measurements.
#[derive(Debug, Clone)]
pub(crate) struct Measurements<'g> {
    pub(crate) entries: Vec<Entry<'g>>,
    pub(crate) total: GradStats,
    pub(crate) norm_type: NormType,
    /// If the rule clips units.
    pub(crate) units: Option<MeasuredUnits>,
    /// The loss of the step, if the rule asks for it and it is known.
    pub(crate) loss: Option<f64>,
}

impl Measurements<'_> {
    /// The norm of the finite elements.
    pub(crate) fn norm(&self) -> Norm {
        self.total.stats.power.root(self.norm_type)
    }

    /// The norm of all elements: NaN if any element is NaN, else infinite if any is infinite.
    pub(crate) fn total_norm(&self) -> f64 {
        norm_of(self.total.stats, self.norm_type)
    }

    /// The norm of each Var's gradient; 0 for a Var without one.
    pub(crate) fn param_norms(&self) -> Vec<f64> {
        self.entries
            .iter()
            .map(|entry| norm_of(entry.measured.stats, self.norm_type))
            .collect()
    }

    /// The first Var with a non-finite element.
    pub(crate) fn first_non_finite(&self) -> Option<usize> {
        self.entries
            .iter()
            .position(|entry| entry.measured.stats.non_finite() > 0)
    }
}

/// The norm with non-finite elements included.
pub(crate) fn norm_of(stats: Stats, norm_type: NormType) -> f64 {
    if stats.nan > 0 {
        f64::NAN
    } else if stats.infinite > 0 {
        f64::INFINITY
    } else {
        stats.power.root(norm_type).value()
    }
}

/// Assigns gradients on CUDA to candle's operations, for work that the CUDA kernels don't support.
pub(crate) fn route_cuda_to_candle_ops(mut entries: Vec<Entry<'_>>) -> Vec<Entry<'_>> {
    for entry in entries.iter_mut().filter(|entry| entry.residency.is_cuda()) {
        entry.residency = Residency::Elsewhere;
    }
    entries
}

/// The units of some Vars, concatenated.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UnitPlan {
    units: Vec<Units>,
    /// The start of each Var's units, and the end of the last.
    starts: Vec<usize>,
    excluded: Vec<bool>,
}

impl UnitPlan {
    /// Takes for each Var its units, its number of elements, and whether it is excluded.
    pub(crate) fn new(vars: impl Iterator<Item = (Units, usize, bool)>) -> Self {
        let (mut units, mut starts, mut excluded) = (Vec::new(), vec![0], Vec::new());
        let mut end = 0;
        for (of_var, elements, is_excluded) in vars {
            end += of_var.count(elements);
            units.push(of_var);
            starts.push(end);
            excluded.push(is_excluded);
        }
        Self {
            units,
            starts,
            excluded,
        }
    }

    /// The number of Vars.
    pub(crate) fn len(&self) -> usize {
        self.units.len()
    }

    /// How a Var is divided into units.
    pub(crate) fn units(&self, index: usize) -> Units {
        self.units[index]
    }

    /// The indices of a Var's units.
    pub(crate) fn range(&self, index: usize) -> Range<usize> {
        self.starts[index]..self.starts[index + 1]
    }

    /// Whether a Var is excluded from clipping.
    pub(crate) fn is_excluded(&self, index: usize) -> bool {
        self.excluded[index]
    }

    pub(crate) fn total(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }
}

/// The measurements of each unit.
#[derive(Debug, Clone)]
pub(crate) struct MeasuredUnits {
    pub(crate) plan: Arc<UnitPlan>,
    /// Of the gradients.
    pub(crate) grads: Vec<Stats>,
    /// Of the Vars' values; zero for Vars that are excluded or have no gradient.
    pub(crate) weights: Vec<Stats>,
}

/// A clip that a GPU can decide without the host: global norm, value, or none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Plan {
    pub(crate) request: Request,
    /// Infinite for none.
    pub(crate) max_norm: f64,
    pub(crate) eps: f64,
    /// If false, non-finite elements are zeroed, as `request` says, or propagate.
    pub(crate) skip_non_finite: bool,
}
