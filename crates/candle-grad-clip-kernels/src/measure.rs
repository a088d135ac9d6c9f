use pulp::NullaryFnOnce;
use rayon::prelude::*;

use crate::block::BLOCK;
use crate::element::Element;
use crate::norm_type::NormType;
use crate::scaled_power_sum::ScaledPowerSum;
use crate::simd::{dispatch, has_fma};

/// Lanes of a sum, for any vector width.
const LANES: usize = 16;
/// Lanes of a maximum. Its bits do not depend on their number.
const MAX_LANES: usize = 64;
/// Elements summed before the lanes are folded. This limits the rounding error of a long sum.
const CHUNK: usize = 16 * 1024;
/// Sums of f64 squares outside this range are computed again with a scale.
pub(crate) const SAFE_SUM: std::ops::Range<f64> = 1e-270..1e300;

/// The measurements of a slice, from one read.
///
/// ```
/// use candle_grad_clip_kernels::{NormType, measure};
///
/// let stats = measure(&[3f32, f32::NAN, -4.0, f32::INFINITY], NormType::L1);
/// assert_eq!((stats.power.sum, stats.nan, stats.infinite), (7.0, 1, 1));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stats {
    /// The power sum of the finite elements.
    pub power: ScaledPowerSum,
    /// The number of NaN elements.
    pub nan: u64,
    /// The number of infinite elements.
    pub infinite: u64,
}

impl Stats {
    /// The stats of no elements.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{NormType, Stats, measure};
    /// assert_eq!(measure::<f32>(&[], NormType::L2), Stats::ZERO);
    /// ```
    pub const ZERO: Self = Self {
        power: ScaledPowerSum::ZERO,
        nan: 0,
        infinite: 0,
    };

    /// The number of NaN and infinite elements.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{NormType, measure};
    /// assert_eq!(measure(&[f32::NAN, 1.0, f32::INFINITY], NormType::L2).non_finite(), 2);
    /// ```
    #[must_use]
    #[inline]
    pub fn non_finite(self) -> u64 {
        self.nan + self.infinite
    }

    /// The stats of both sets of elements. Fold in a fixed order: see [`ScaledPowerSum::merge`].
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{NormType, measure};
    /// let [left, right] = [[1f64, 2.0], [3.0, 4.0]].map(|half| measure(&half, NormType::L2));
    /// assert_eq!(left.merge(right, NormType::L2), measure(&[1f64, 2.0, 3.0, 4.0], NormType::L2));
    /// ```
    #[must_use]
    #[inline]
    pub fn merge(self, other: Self, norm_type: NormType) -> Self {
        Self {
            power: self.power.merge(other.power, norm_type),
            nan: self.nan + other.nan,
            infinite: self.infinite + other.infinite,
        }
    }
}

/// The measurements of a slice before and after clamping, from one read.
///
/// ```
/// use candle_grad_clip_kernels::{NormType, measure_clamped};
///
/// let stats = measure_clamped(&[f32::INFINITY, 0.5, f32::NAN], NormType::Inf, 1.0);
/// assert_eq!((stats.before.infinite, stats.after.infinite), (1, 0)); // the bound now
/// assert_eq!((stats.after.nan, stats.num_clipped), (1, 1));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClampStats {
    /// The stats before clamping.
    pub before: Stats,
    /// The stats after clamping: an infinite element counts as the bound, and NaN stays NaN.
    pub after: Stats,
    /// The number of elements that clamping changes, without NaN.
    pub num_clipped: u64,
}

/// Reads `values` once and returns their [`Stats`]. Parallel for more than one [`BLOCK`].
///
/// The relative error of the norm is at most 1e-12 for L1, L2, infinity and `p >= 0.5`.
///
/// ```
/// use candle_grad_clip_kernels::{NormType, measure};
///
/// let stats = measure(&[3e25f32, 4e25, f32::NAN], NormType::L2);
/// assert_eq!((stats.nan, stats.infinite), (1, 0));
/// let norm = stats.power.root(NormType::L2).value(); // of the finite elements
/// assert!((norm / 5e25 - 1.0).abs() < 1e-7);
/// ```
#[must_use]
#[inline]
pub fn measure<E: Element>(values: &[E], norm_type: NormType) -> Stats {
    let of = |chunk: &[E]| measure_chunk(chunk, norm_type, None);
    by_chunk(values, Stats::ZERO, of, |a, b| a.merge(b, norm_type))
}

/// As [`measure`](fn@measure), but also measures the elements clamped to
/// `[-clip_value, clip_value]`, with the bound rounded to the dtype. It still reads the slice once
/// from memory: later passes find it in the cache.
///
/// ```
/// use candle_grad_clip_kernels::{NormType, measure_clamped};
///
/// let stats = measure_clamped(&[3f64, 4.0, 0.5], NormType::L1, 1.0);
/// assert_eq!(stats.num_clipped, 2);
/// assert_eq!(stats.after.power.root(NormType::L1).value(), 2.5);
/// ```
#[must_use]
pub fn measure_clamped<E: Element>(
    values: &[E],
    norm_type: NormType,
    clip_value: f64,
) -> ClampStats {
    let bound = E::round(clip_value);
    let of = |chunk: &[E]| ClampStats {
        before: measure_chunk(chunk, norm_type, None),
        after: measure_chunk(chunk, norm_type, Some(bound)),
        num_clipped: dispatch(CountAbove(chunk, bound)),
    };
    let none = ClampStats {
        before: Stats::ZERO,
        after: Stats::ZERO,
        num_clipped: 0,
    };
    by_chunk(values, none, of, |a, b| ClampStats {
        before: a.before.merge(b.before, norm_type),
        after: a.after.merge(b.after, norm_type),
        num_clipped: a.num_clipped + b.num_clipped,
    })
}

/// Calls `of` on every chunk, and folds the results in order.
#[inline]
fn by_chunk<E: Element, S: Copy + Send + Sync>(
    values: &[E],
    none: S,
    of: impl Fn(&[E]) -> S + Sync,
    fold: impl Fn(S, S) -> S + Sync,
) -> S {
    if values.len() <= CHUNK {
        return of(values);
    }
    let block = |values: &[E]| values.chunks(CHUNK).map(&of).fold(none, &fold);
    if values.len() <= BLOCK {
        return block(values);
    }
    let blocks: Vec<S> = values.par_chunks(BLOCK).map(block).collect();
    blocks.into_iter().fold(none, fold)
}

#[inline]
fn measure_chunk<E: Element>(chunk: &[E], norm_type: NormType, clip_value: Option<f64>) -> Stats {
    if let Some(sum) = plain_sum(chunk, norm_type, clip_value) {
        // A NaN or infinite element makes the sum non-finite. For dtypes up to 32 bits nothing else
        // can.
        if (E::EXACT_SQUARES && sum.is_finite()) || SAFE_SUM.contains(&sum) {
            let power = ScaledPowerSum { scale: 1.0, sum };
            return Stats {
                power,
                ..Stats::ZERO
            };
        }
    }
    let largest = max_abs_bits(chunk);
    if largest < E::INFINITY {
        let clip_value = clip_value.unwrap_or(f64::INFINITY);
        let power = scaled_power(chunk, norm_type, E::from_abs_bits(largest), clip_value);
        return Stats {
            power,
            ..Stats::ZERO
        };
    }
    measure_non_finite(chunk, norm_type, clip_value)
}

/// The sum of `|x|` or `x^2`, without a scale. `None` for other norms.
fn plain_sum<E: Element>(chunk: &[E], norm_type: NormType, clip_value: Option<f64>) -> Option<f64> {
    Some(match (norm_type, clip_value) {
        (NormType::L1, None) => lane_sum(chunk, |sum, x| sum + x.abs()),
        (NormType::L1, Some(c)) => lane_sum(chunk, |sum, x| sum + at_most(x.abs(), c)),
        // The square is exact, so a fused multiply-add gives the same bits, and is faster.
        (NormType::L2, None) if E::EXACT_SQUARES && has_fma() => {
            lane_sum(chunk, |sum, x| x.mul_add(x, sum))
        }
        (NormType::L2, None) => lane_sum(chunk, |sum, x| sum + x * x),
        (NormType::L2, Some(c)) => lane_sum(chunk, |sum, x| sum + at_most(x.abs(), c).powi(2)),
        (NormType::Inf | NormType::P(_), _) => return None,
    })
}

/// The smaller of both. NaN stays NaN.
#[inline(always)]
fn at_most(x: f64, bound: f64) -> f64 {
    if x > bound { bound } else { x }
}

/// Adds every `x` to a sum by `add(sum, x)`, in [`LANES`] lanes that are folded pairwise.
struct LaneSum<'a, E, F>(&'a [E], F);

impl<E: Element, F: Fn(f64, f64) -> f64> NullaryFnOnce for LaneSum<'_, E, F> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        let Self(chunk, add) = self;
        let mut lanes = [0.0; LANES];
        let (rows, rest) = chunk.as_chunks::<LANES>();
        for row in rows {
            for i in 0..LANES {
                lanes[i] = add(lanes[i], row[i].to_f64());
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane = add(*lane, x.to_f64());
        }
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }
}

fn lane_sum<E: Element>(chunk: &[E], add: impl Fn(f64, f64) -> f64) -> f64 {
    dispatch(LaneSum(chunk, add))
}

/// The largest [`Element::abs_bits`].
struct MaxAbsBits<'a, E>(&'a [E]);

impl<E: Element> NullaryFnOnce for MaxAbsBits<'_, E> {
    type Output = E::Bits;

    #[inline(always)]
    fn call(self) -> E::Bits {
        let mut lanes = [E::Bits::default(); MAX_LANES];
        let (rows, rest) = self.0.as_chunks::<MAX_LANES>();
        for row in rows {
            for i in 0..MAX_LANES {
                lanes[i] = lanes[i].max(row[i].abs_bits());
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane = (*lane).max(x.abs_bits());
        }
        lanes.into_iter().max().unwrap_or_default()
    }
}

fn max_abs_bits<E: Element>(chunk: &[E]) -> E::Bits {
    dispatch(MaxAbsBits(chunk))
}

/// Counts the elements with `|x|` above a value.
struct CountAbove<'a, E>(&'a [E], f64);

impl<E: Element> NullaryFnOnce for CountAbove<'_, E> {
    type Output = u64;

    #[inline(always)]
    fn call(self) -> u64 {
        self.0
            .iter()
            .map(|x| u64::from(x.to_f64().abs() > self.1))
            .sum()
    }
}

/// The power sum of the finite elements, divided by a scale that keeps every term at or below about
/// 1.
fn scaled_power<E: Element>(
    chunk: &[E],
    norm_type: NormType,
    largest: f64,
    clip_value: f64,
) -> ScaledPowerSum {
    let largest = at_most(largest, clip_value);
    if largest == 0.0 {
        return ScaledPowerSum::ZERO;
    }
    // Division by a power of two is exact.
    let scale = match norm_type {
        NormType::L1 | NormType::L2 => power_of_two(largest),
        NormType::Inf | NormType::P(_) => largest,
    };
    let ratio = |x: f64| at_most(x.abs(), clip_value) / scale;
    let sum = match norm_type {
        NormType::Inf => 1.0,
        NormType::L1 => lane_sum(chunk, |sum, x| sum + ratio(x)),
        NormType::L2 => lane_sum(chunk, |sum, x| sum + ratio(x).powi(2)),
        NormType::P(p) => lane_sum(chunk, |sum, x| sum + ratio(x).powf(p)),
    };
    ScaledPowerSum { scale, sum }
}

/// The largest power of two at or below `x > 0`.
fn power_of_two(x: f64) -> f64 {
    let exponent = x.to_bits() & 0x7ff0_0000_0000_0000;
    if exponent == 0 {
        f64::MIN_POSITIVE
    } else {
        f64::from_bits(exponent)
    }
}

/// The slow path for a chunk with NaN or infinite elements: counts them, and measures the others.
#[cold]
fn measure_non_finite<E: Element>(
    chunk: &[E],
    norm_type: NormType,
    clip_value: Option<f64>,
) -> Stats {
    let mut stats = Stats::ZERO;
    let mut finite = Vec::with_capacity(chunk.len());
    for x in chunk {
        let x = at_most(x.to_f64().abs(), clip_value.unwrap_or(f64::INFINITY));
        if x.is_finite() {
            finite.push(x);
        } else if x.is_nan() {
            stats.nan += 1;
        } else {
            stats.infinite += 1;
        }
    }
    stats.power = measure_chunk(&finite, norm_type, None).power;
    stats
}
