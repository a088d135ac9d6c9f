//! accumulate: the gradients of several micro-batches, added up for one clip and one step.

mod sums;

use std::fmt;
use std::sync::LazyLock;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use candle_grad_clip_kernels::{Edit, NormType};

use crate::backend;
use crate::clip::NonFinite;
use crate::error::{Error, Result};
use crate::gradients::{Entry, Request, route_cuda_to_candle_ops};
use crate::pipeline::collect::check_any_match;
use crate::pipeline::measure::{measure, non_finite_error, walk};
use crate::vars::NamedVars;
use sums::Sums;

/// Adds up the gradients of micro-batches, for one clip and one step with all of them.
///
/// ```text
/// g = (1 / k) sum of g_i    (mean)        g = sum of g_i    (sum)        i = 1 ... k
/// ```
///
/// With [weights](Self::add_weighted), `w_i g_i` is in the place of `g_i`, and the sum of the
/// weights in the place of `k`.
///
/// With the mean, `k` micro-batches of one size, each with a mean loss, give the gradient of the
/// one big batch, to rounding. Clip that, once: clipping each micro-batch is another thing ((2, 0)
/// and (0, 2) at 1 become (1, 1) then, but their sum becomes (0.71, 0.71)).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_grad_clip::{Clip, ClippedOptimizer, GradAccumulator};
/// use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let model = candle_nn::linear(4, 1, vb)?;
/// let opt = AdamW::new(varmap.all_vars(), ParamsAdamW::default())?;
/// let mut opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?;
/// let mut accumulator = GradAccumulator::mean(&varmap);
///
/// let batch = Tensor::randn(0f32, 1.0, (8, 4), &Device::Cpu)?;
/// for micro_batch in batch.chunk(4, 0)? {
///     let loss = model.forward(&micro_batch)?.sqr()?.mean_all()?;
///     accumulator.add(&loss.backward()?)?;
/// }
/// if let Some(grads) = accumulator.take_grads()? {
///     let report = opt.step_report(grads)?; // one clip, one step
///     assert!(report.missing_grads().is_empty());
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Precision and memory
/// Sums are f64 for f64 Vars and f32 for all others, in buffers of the accumulator's own, made by
/// the first micro-batch; on CPU nothing of a gradient's size is allocated after that (but for
/// gradients that are not contiguous), in later rounds neither. f16 and bf16 gradients are added in
/// f32 and rounded once, at the end: each Var's gradient has the Var's dtype everywhere in candle,
/// whose optimizers compute with it. A *sum* of f16 gradients beyond 65504 is infinite then.
///
/// The bits depend on the micro-batches and their order only, not on the number of threads.
///
/// # Missing gradients
/// A Var without a gradient in a micro-batch has the gradient 0 there, as in the sum of the losses:
/// the mean divides by the number of micro-batches, for each Var. A Var without one in all of them
/// has none in [`take_grads`](Self::take_grads)'s store, so the report of the step names it.
///
/// # References
/// Gradient accumulation of PyTorch (`loss / k`, `backward` k times, one `step`); PyTorch issue 986
/// on where to clip.
pub struct GradAccumulator {
    vars: NamedVars,
    is_mean: bool,
    non_finite: NonFinite,
    sums: Sums,
    /// What `take_grads` lends.
    store: Option<GradStore>,
    micro_batches: u64,
    /// The sum of the weights since the last `take_grads`, in units of `unit`.
    weight: f64,
    /// The power of two below the first of these weights: sums of very small or large weights stay
    /// in f32's range.
    unit: f64,
    dropped: u64,
    /// Micro-batches since the last `take_grads` that are not in the sum.
    left_out: u64,
    empty_in_a_row: u32,
    max_skips: u32,
}

/// By the entry of this tensor a [`LossScaler`](crate::LossScaler) knows a store of sums that may
/// lack what was not finite.
static HIDES_OVERFLOW: LazyLock<Option<Tensor>> =
    LazyLock::new(|| Tensor::new(0u8, &Device::Cpu).ok());

/// Whether an accumulator made the store, and left out what was not finite.
pub(crate) fn hides_overflow(grads: &GradStore) -> bool {
    let marker = HIDES_OVERFLOW.as_ref();
    marker.is_some_and(|marker| grads.get(marker).is_some())
}

impl GradAccumulator {
    /// The mean over the micro-batches. `vars` are those of the optimizer, with their names (see
    /// [`NamedVars`]).
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::GradAccumulator;
    /// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    /// let mut accumulator = GradAccumulator::mean(vec![w.clone()]);
    /// accumulator.add(&(w.as_tensor() * 2.0)?.sum_all()?.backward()?)?; // the gradient is (2, 2)
    /// accumulator.add(&(w.as_tensor() * 4.0)?.sum_all()?.backward()?)?;
    /// let grads = accumulator.take_grads()?.unwrap();
    /// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [3.0, 3.0]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    pub fn mean(vars: impl Into<NamedVars>) -> Self {
        Self::new(vars.into(), true)
    }

    /// The sum over the micro-batches: for losses that are divided already, or summed over their
    /// samples.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::GradAccumulator;
    /// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    /// let mut accumulator = GradAccumulator::sum(vec![w.clone()]);
    /// for _ in 0..3 {
    ///     accumulator.add(&w.sum_all()?.backward()?)?; // the gradient is (1, 1)
    /// }
    /// let grads = accumulator.take_grads()?.unwrap();
    /// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [3.0, 3.0]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    pub fn sum(vars: impl Into<NamedVars>) -> Self {
        Self::new(vars.into(), false)
    }

    fn new(vars: NamedVars, is_mean: bool) -> Self {
        Self {
            sums: Sums::new(vars.vars().len()),
            vars,
            is_mean,
            non_finite: NonFinite::Propagate,
            store: None,
            micro_batches: 0,
            weight: 0.0,
            unit: 1.0,
            dropped: 0,
            left_out: 0,
            empty_in_a_row: 0,
            max_skips: 10,
        }
    }

    /// What to do with a micro-batch whose gradients are not finite. Default:
    /// [`NonFinite::Propagate`].
    ///
    /// | | |
    /// |---|---|
    /// | [`NonFinite::Propagate`] | it is added, so the sum is not finite, and the optimizer's own policy has its say, with a report |
    /// | [`NonFinite::SkipStep`] | it is left out, whole, and [counted](Self::dropped); the mean is that of the others |
    /// | [`NonFinite::Zero`] | its elements that are not finite count as 0 |
    /// | [`NonFinite::Error`] | an error that names the Var; the sum is as it was, without it |
    ///
    /// Propagate, since a big batch with one bad sample is a bad batch, and since a
    /// [`LossScaler`](crate::LossScaler) must hear of an overflow: a wrapper with a scaler refuses
    /// the sums of `SkipStep` and `Zero` ([`Error::HiddenOverflow`]). To know them, it looks for an
    /// entry that their store has beside the gradients. `SkipStep` and `Error` read each gradient
    /// once more.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::{GradAccumulator, NonFinite};
    /// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    /// let mut accumulator = GradAccumulator::mean(vec![w.clone()]).non_finite(NonFinite::SkipStep);
    /// for factor in [2.0, f64::NAN, 4.0] {
    ///     accumulator.add(&(w.as_tensor() * factor)?.sum_all()?.backward()?)?;
    /// }
    /// assert_eq!((accumulator.micro_batches(), accumulator.dropped()), (2, 1));
    /// let grads = accumulator.take_grads()?.unwrap();
    /// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [3.0, 3.0]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn non_finite(mut self, non_finite: NonFinite) -> Self {
        self.non_finite = non_finite;
        self
    }

    /// How many windows in a row (from one [`take_grads`](Self::take_grads) to the next) may end empty,
    /// as all their micro-batches were dropped or had weight 0, before `take_grads` is an error.
    /// Default: 10, as [`Clip::max_skips`](crate::Clip::max_skips).
    #[must_use]
    pub fn max_skips(mut self, max_skips: u32) -> Self {
        self.max_skips = max_skips;
        self
    }

    /// Adds the gradients of one micro-batch; they are not changed. Gradients of anything but the
    /// accumulator's Vars are left out.
    ///
    /// # Errors
    /// A gradient whose shape, dtype or device is not its Var's, or of an integer or 8-bit dtype; a
    /// store that has gradients, but none for any of the Vars; gradients that are not finite under
    /// [`NonFinite::Error`]. The sum is as it was then.
    pub fn add(&mut self, grads: &GradStore) -> Result<()> {
        self.add_weighted(grads, 1.0)
    }

    /// As [`add`](Self::add), for micro-batches that do not all count the same: the mean is `sum of
    /// w_i g_i / sum of w_i`, the sum `sum of w_i g_i`.
    ///
    /// Where each loss is a mean over tokens, its weight is the number of its tokens; where it is
    /// divided by the sum of its samples' weights, that sum. `add` has weight 1. A micro-batch of
    /// weight 0 is left out whole, whatever its gradients are: the mean over no tokens is NaN.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::GradAccumulator;
    /// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
    /// let mut accumulator = GradAccumulator::mean(vec![w.clone()]);
    /// accumulator.add_weighted(&(w.as_tensor() * 2.0)?.sum_all()?.backward()?, 300.0)?; // the gradient is (2, 2)
    /// accumulator.add_weighted(&(w.as_tensor() * 6.0)?.sum_all()?.backward()?, 100.0)?;
    /// let grads = accumulator.take_grads()?.unwrap();
    /// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [3.0, 3.0]); // (300 * 2 + 100 * 6) / 400
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`add`](Self::add); a weight below 0 or not finite, or one that makes their sum infinite.
    pub fn add_weighted(&mut self, grads: &GradStore, weight: f64) -> Result<()> {
        let invalid = |expected| {
            Err(Error::InvalidOption {
                name: "weight",
                value: weight,
                expected,
            })
        };
        if !(weight >= 0.0 && weight.is_finite()) {
            return invalid("0 or a finite number above");
        }
        if weight == 0.0 {
            walk(self.vars.list(), grads, None)
                .and_then(|entries| self.check_ours(grads, &entries))?;
            self.left_out += 1;
            return Ok(());
        }
        let (unit, before) = match self.micro_batches {
            0 => (power_of_two_below(weight), 0.0),
            _ => (self.unit, self.weight),
        };
        let sum_of_weights = before + weight / unit;
        if !sum_of_weights.is_finite() {
            return invalid("one whose sum with those before it is finite");
        }
        let Some(entries) = self.collect(grads)? else {
            self.dropped += 1;
            self.left_out += 1;
            return Ok(());
        };
        let edit = Edit::Scale {
            clip_coef: weight / unit,
            zero_non_finite: self.non_finite == NonFinite::Zero,
        };
        self.sums.add(&self.vars, &entries, edit)?;
        self.micro_batches += 1;
        (self.weight, self.unit) = (sum_of_weights, unit);
        Ok(())
    }

    /// The mean or the sum, to clip and to step with; `None` if there was no micro-batch, or none
    /// that was not dropped and had a weight: then there is no step to take. The next
    /// [`add`](Self::add) starts anew.
    ///
    /// The store is lent, so it can be edited in place ([`clip_grad_norm`](crate::clip_grad_norm)).
    /// Its tensors are the accumulator's buffers: a clone of one is written over by the next round.
    ///
    /// # Errors
    /// More windows in a row ended empty than [`max_skips`](Self::max_skips) allows; a device.
    pub fn take_grads(&mut self) -> Result<Option<&mut GradStore>> {
        if self.micro_batches == 0 {
            return self.finish_empty().map(|()| None);
        }
        let coef = if self.is_mean {
            1.0 / self.weight
        } else {
            self.unit
        };
        let mut store = self.sums.rounded(&self.vars, coef)?;
        if matches!(self.non_finite, NonFinite::SkipStep | NonFinite::Zero)
            && let Some(marker) = &*HIDES_OVERFLOW
        {
            store.insert(marker, marker.clone());
        }
        self.empty_in_a_row = 0;
        self.clear();
        Ok(Some(self.store.insert(store)))
    }

    /// Forgets the micro-batches since the last [`take_grads`](Self::take_grads).
    pub fn clear(&mut self) {
        self.micro_batches = 0;
        self.left_out = 0;
        self.sums.clear();
    }

    /// Micro-batches in the sum, without those that were dropped.
    #[must_use]
    pub fn micro_batches(&self) -> u64 {
        self.micro_batches
    }

    /// Micro-batches that were left out under [`NonFinite::SkipStep`], since the accumulator was
    /// made.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// The end of a window without a sum; one without micro-batches is none.
    fn finish_empty(&mut self) -> Result<()> {
        if std::mem::take(&mut self.left_out) == 0 {
            return Ok(());
        }
        self.empty_in_a_row = self.empty_in_a_row.saturating_add(1);
        if self.empty_in_a_row > self.max_skips {
            return Err(Error::TooManyEmptyWindows {
                windows: self.empty_in_a_row,
                max_skips: self.max_skips,
                dropped: self.dropped,
            });
        }
        Ok(())
    }

    /// A store of gradients must have one for our Vars.
    fn check_ours(&self, grads: &GradStore, entries: &[Entry<'_>]) -> Result<()> {
        let has_ours = entries.iter().any(|entry| entry.grad.is_some());
        if has_ours {
            return Ok(());
        }
        check_any_match(self.vars.vars(), grads)
    }

    /// The gradients of a micro-batch, `None` if it is to be dropped.
    fn collect<'g>(&self, grads: &'g GradStore) -> Result<Option<Vec<Entry<'g>>>> {
        let vars = self.vars.list();
        if matches!(self.non_finite, NonFinite::Zero | NonFinite::Propagate) {
            let mut entries = route_cuda_to_candle_ops(walk(vars, grads, None)?);
            self.check_ours(grads, &entries)?;
            if self.non_finite == NonFinite::Zero {
                backend::candle_ops::measure(&mut entries, Request::norm(NormType::L1))?;
            }
            return Ok(Some(entries));
        }
        let measured = measure(vars, grads, Request::norm(NormType::L2))?;
        self.check_ours(grads, &measured.entries)?;
        let Some(bad) = measured.first_non_finite() else {
            return Ok(Some(route_cuda_to_candle_ops(measured.entries)));
        };
        if self.non_finite == NonFinite::Error {
            return Err(non_finite_error(vars, &measured));
        }
        tracing::warn!(
            var = self.vars.names()[bad],
            non_finite = measured.total.stats.non_finite(),
            "micro-batch dropped: gradients are not finite"
        );
        Ok(None)
    }
}

/// The largest power of two that is not above `weight`, which is above 0; of a subnormal number the
/// smallest normal one.
fn power_of_two_below(weight: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    f64::from_bits(weight.to_bits() & !MANTISSA).max(f64::MIN_POSITIVE)
}

impl fmt::Debug for GradAccumulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GradAccumulator")
            .field("vars", &self.vars.vars().len())
            .field("is_mean", &self.is_mean)
            .field("non_finite", &self.non_finite)
            .field("micro_batches", &self.micro_batches)
            .field("weight", &(self.weight * self.unit))
            .field("dropped", &self.dropped)
            .finish_non_exhaustive()
    }
}
