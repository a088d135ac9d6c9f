//! collect and measure: one walk over the Vars, one read of every gradient.

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use candle_grad_clip_kernels::{BLOCK, Norm, NormType, Stats};
use rustc_hash::{FxBuildHasher, FxHashSet};

use crate::Result;
use crate::backend::{self, Backends, Place};
use crate::grads::collect;
use crate::units::MeasuredUnits;
use crate::vars::VarList;

/// Vars that one task collects and measures.
const VARS_PER_TASK: usize = 64;

/// What is to be measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Request {
    pub(crate) norm_type: NormType,
    /// Also measure the gradients as they would be when clamped to this.
    pub(crate) clip_value: Option<f64>,
    /// Elements that are not finite will be 0 then, not the bound or NaN.
    pub(crate) zero_non_finite: bool,
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

impl GradStats {
    /// Those of the same gradient divided by `scale`, a power of two: exact.
    fn unscaled(mut self, scale: f64) -> Self {
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
    const EMPTY: Self = Self {
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

/// Leaves gradients on CUDA to candle's operations: for what our kernels there can't do.
pub(crate) fn without_cuda(mut entries: Vec<Entry<'_>>) -> Vec<Entry<'_>> {
    for entry in entries.iter_mut().filter(|entry| entry.place.is_cuda()) {
        entry.place = Place::Elsewhere;
    }
    entries
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

/// As [`measure`], of the gradients divided by `scale`, a power of two; `clip_value` is that of the divided ones, too.
pub(crate) fn measure_unscaled<'g>(
    vars: VarList<'_>,
    grads: &'g GradStore,
    mut request: Request,
    scale: f64,
) -> Result<Measurements<'g>> {
    if scale == 1.0 {
        return measure(vars, grads, request);
    }
    request.clip_value = request.clip_value.map(|clip_value| clip_value * scale);
    let mut measured = measure(vars, grads, request)?;
    measured.total = measured.total.unscaled(scale);
    for entry in &mut measured.entries {
        entry.measured = entry.measured.unscaled(scale);
    }
    Ok(measured)
}

/// Collects and measures the gradients of `vars`.
pub(crate) fn measure<'g>(
    vars: VarList<'_>,
    grads: &'g GradStore,
    request: Request,
) -> Result<Measurements<'g>> {
    let mut entries = walk(vars, grads, Some(request))?;
    let mut total = backend::measure_cuda(&mut entries, request)?;
    backend::measure_composed(&mut entries, request)?;
    let others = |entry: &&Entry<'_>| entry.grad.is_some() && !entry.place.is_cuda();
    for entry in entries.iter().filter(others) {
        total = total.merge(entry.measured, request.norm_type);
    }
    Ok(Measurements {
        entries,
        total,
        norm_type: request.norm_type,
        units: None,
        loss: None,
    })
}

/// Collects the gradients of `vars`, and with a `request` measures those on CPU.
pub(crate) fn walk<'g>(
    vars: VarList<'_>,
    grads: &'g GradStore,
    request: Option<Request>,
) -> Result<Vec<Entry<'g>>> {
    let mut entries = vec![Entry::EMPTY; vars.vars.len()];
    let backends = Backends::current();
    let block = |(task, block): (usize, &mut [Entry<'g>])| {
        walk_block(vars, task * VARS_PER_TASK, grads, block, request, backends)
    };
    let blocks = entries.chunks_mut(VARS_PER_TASK).enumerate();
    backend::for_each(vars.work, blocks, block)?;
    if vars.may_repeat() {
        forget_repeated(&mut entries);
    }
    let Some(request) = request else {
        return Ok(entries);
    };
    let is_large = |entry: &&mut Entry<'_>| entry.elements > BLOCK && entry.place.is_cpu();
    let large = entries.iter_mut().filter(is_large);
    backend::for_each_large(vars.work, large, |entry| {
        backend::measure_cpu(entry, request)
    })?;
    Ok(entries)
}

/// Collects a block of gradients, and measures those that one thread should.
fn walk_block<'g>(
    vars: VarList<'_>,
    start: usize,
    grads: &'g GradStore,
    block: &mut [Entry<'g>],
    request: Option<Request>,
    backends: Backends,
) -> Result<()> {
    let mut found = [None; VARS_PER_TASK];
    let found = &mut found[..block.len()];
    collect(vars, start, grads, found)?;
    for (entry, grad) in block.iter_mut().zip(&*found) {
        if let Some(grad) = *grad {
            entry.grad = Some(grad);
            entry.place = backends.place(grad);
            entry.elements = grad.elem_count();
        }
    }
    for entry in block
        .iter_mut()
        .filter(|entry| entry.place != Place::Elsewhere)
    {
        let Some(grad) = entry.grad else { continue };
        match request {
            Some(request) if entry.place.is_cpu() && entry.elements <= BLOCK => {
                backend::measure_cpu(entry, request)?;
            }
            Some(_) if entry.place.is_cpu() => {} // large: later, in parallel
            _ => entry.storage = backend::storage_address(grad),
        }
    }
    Ok(())
}

/// Keeps one entry of a Var that is listed twice: both found the same gradient.
fn forget_repeated(entries: &mut [Entry<'_>]) {
    let grads = entries.iter().filter_map(|entry| entry.grad);
    let addresses = grads.map(|grad| std::ptr::from_ref(grad).addr());
    if !any_equal(entries.len(), addresses) {
        return;
    }
    let mut seen = FxHashSet::with_capacity_and_hasher(entries.len(), FxBuildHasher);
    for entry in entries {
        if let Some(grad) = entry.grad
            && !seen.insert(std::ptr::from_ref(grad).addr())
        {
            *entry = Entry::EMPTY;
        }
    }
}

/// Whether any two of up to `len` addresses are equal, or one is 0.
///
/// A table with room for twice as many, by linear probing: a hash set takes four times as long, which
/// counts with small gradients.
pub(crate) fn any_equal(len: usize, addresses: impl IntoIterator<Item = usize>) -> bool {
    let bits = (2 * len + 1).next_power_of_two().ilog2();
    let mut table = vec![0; 1 << bits];
    addresses.into_iter().any(|address| {
        let hash = (address as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15); // 2^64 / golden ratio
        let mut slot = (hash >> (u64::BITS - bits)) as usize;
        while table[slot] != 0 && table[slot] != address {
            slot = (slot + 1) & (table.len() - 1);
        }
        std::mem::replace(&mut table[slot], address) == address
    })
}

#[cfg(test)]
mod tests {
    use super::any_equal;

    #[test]
    fn equal_addresses_are_found_wherever_they_are() {
        for len in [0, 1, 2, 30, 1000] {
            let addresses: Vec<usize> = (1..=len).map(|i| 0x7f00_0000_0000 + 16 * i).collect();
            assert!(!any_equal(len, addresses.iter().copied()), "{len}");
            for i in 1..len {
                let mut repeated = addresses.clone();
                repeated[i] = addresses[i / 2];
                assert!(any_equal(len, repeated), "{i} of {len}");
            }
        }
    }
}
