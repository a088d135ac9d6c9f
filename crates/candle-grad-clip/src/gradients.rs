//! What travels from one verb to the next: the gradients of the Vars, and what measuring them told.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use candle_grad_clip_kernels::{Norm, NormType, Stats, Units};

/// What can be done to a gradient where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Read and written by our kernels.
    Cpu,
    /// On CPU, but not one after the other, or a Var itself: what changes is a copy.
    CpuCopied,
    /// Read and written by our CUDA kernels.
    Cuda,
    /// As `CpuCopied`, on an NVIDIA GPU.
    CudaCopied,
    /// candle's operations only.
    Elsewhere,
}

impl Place {
    pub(crate) fn is_cpu(self) -> bool {
        matches!(self, Self::Cpu | Self::CpuCopied)
    }

    pub(crate) fn is_cuda(self) -> bool {
        matches!(self, Self::Cuda | Self::CudaCopied)
    }

    /// Whether a gradient that shares its storage with no other can be edited where it is.
    pub(crate) fn is_in_place(self) -> bool {
        matches!(self, Self::Cpu | Self::Cuda)
    }
}

/// What is to be measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Request {
    pub(crate) norm_type: NormType,
    /// Also measure the gradients as they would be when clamped to this.
    pub(crate) clip_value: Option<f64>,
    /// Elements that are not finite will be 0 then, not the bound or NaN.
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

/// What one read of one gradient tells.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GradStats {
    pub(crate) stats: Stats,
    /// What clamping to [`Request::clip_value`] leaves.
    pub(crate) clamped: Stats,
    /// How many elements that clamping changes.
    pub(crate) num_clipped: u64,
}

impl GradStats {
    /// Those of the same gradient divided by `scale`, a power of two: exact.
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

    pub(crate) fn merge(self, other: Self, norm_type: NormType) -> Self {
        Self {
            stats: self.stats.merge(other.stats, norm_type),
            clamped: self.clamped.merge(other.clamped, norm_type),
            num_clipped: self.num_clipped + other.num_clipped,
        }
    }
}

/// One Var's gradient, if it got one.
///
/// All that later passes ask of it is kept here: asking thousands of tensors costs a cache miss or
/// two each, every time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'g> {
    pub(crate) grad: Option<&'g Tensor>,
    pub(crate) place: Place,
    pub(crate) elements: usize,
    /// Where the storage is: equal for tensors that share it. Not known for [`Place::Elsewhere`].
    pub(crate) storage: usize,
    pub(crate) measured: GradStats,
}

impl Entry<'_> {
    pub(crate) const EMPTY: Self = Self {
        grad: None,
        place: Place::Elsewhere,
        elements: 0,
        storage: 0,
        measured: GradStats::ZERO,
    };

    /// Whether all elements are finite, if it was measured.
    pub(crate) fn is_finite(&self) -> bool {
        self.measured.stats.non_finite() == 0
    }
}

/// The gradients of some Vars, in the order of the Vars, and what measuring them told.
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

    /// The norm of all elements: NaN if any is, else infinite if any is.
    pub(crate) fn total_norm(&self) -> f64 {
        norm_of(self.total.stats, self.norm_type)
    }

    /// The norm of each Var's gradient; 0 for those without one.
    pub(crate) fn param_norms(&self) -> Vec<f64> {
        self.entries
            .iter()
            .map(|entry| norm_of(entry.measured.stats, self.norm_type))
            .collect()
    }

    /// The first Var with an element that is not finite.
    pub(crate) fn first_non_finite(&self) -> Option<usize> {
        self.entries
            .iter()
            .position(|entry| entry.measured.stats.non_finite() > 0)
    }
}

/// The norm with what is not finite counted in.
pub(crate) fn norm_of(stats: Stats, norm_type: NormType) -> f64 {
    if stats.nan > 0 {
        f64::NAN
    } else if stats.infinite > 0 {
        f64::INFINITY
    } else {
        stats.power.root(norm_type).value()
    }
}

/// Leaves gradients on CUDA to candle's operations: for what our kernels there can't do.
pub(crate) fn route_cuda_to_candle_ops(mut entries: Vec<Entry<'_>>) -> Vec<Entry<'_>> {
    for entry in entries.iter_mut().filter(|entry| entry.place.is_cuda()) {
        entry.place = Place::Elsewhere;
    }
    entries
}

/// The units of some Vars, all of them behind each other.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UnitPlan {
    units: Vec<Units>,
    /// Where those of each Var begin, and where the last end.
    starts: Vec<usize>,
    excluded: Vec<bool>,
}

impl UnitPlan {
    /// One for each Var: its units, its number of elements, and whether it is left out.
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

    /// How many Vars there are.
    pub(crate) fn len(&self) -> usize {
        self.units.len()
    }

    /// How a Var is divided.
    pub(crate) fn units(&self, index: usize) -> Units {
        self.units[index]
    }

    /// Where a Var's units are among all.
    pub(crate) fn range(&self, index: usize) -> Range<usize> {
        self.starts[index]..self.starts[index + 1]
    }

    /// Whether a Var is not to be clipped.
    pub(crate) fn is_excluded(&self, index: usize) -> bool {
        self.excluded[index]
    }

    pub(crate) fn total(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }
}

/// What was measured of each unit.
#[derive(Debug, Clone)]
pub(crate) struct MeasuredUnits {
    pub(crate) plan: Arc<UnitPlan>,
    /// Of the gradients.
    pub(crate) grads: Vec<Stats>,
    /// Of the Vars' values; nothing of those that are left out or have no gradient.
    pub(crate) weights: Vec<Stats>,
}

/// A clip that a GPU can decide by itself: of the global norm, to a value, or none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Plan {
    pub(crate) request: Request,
    /// Infinite for none.
    pub(crate) max_norm: f64,
    pub(crate) eps: f64,
    /// Otherwise they are zeroed, as `request` says, or propagate.
    pub(crate) skip_non_finite: bool,
}
