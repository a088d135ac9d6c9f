use pulp::NullaryFnOnce;
use rayon::prelude::*;

use crate::block::BLOCK;
use crate::edit::{Edit, specialise};
use crate::element::{Element, ElementEdit};
use crate::simd::dispatch;
use crate::wide::Wide;

/// Elements per widening step, into a stack buffer that stays in the cache.
const CHUNK: usize = 512;

/// Adds the edited `source` to `sum`, in f64 for f64 and in f32 for the others; with `is_first`,
/// overwrites `sum`. Parallel for more than one [`BLOCK`]. Each element takes one addition, so the
/// result depends only on the order of the calls.
///
/// ```
/// use candle_grad_clip_kernels::{Edit, accumulate};
/// use half::f16;
///
/// let mut sum = [f32::NAN; 2];
/// accumulate(&[f16::from_f32(60000.0), f16::from_f32(1.0)], &mut sum, Edit::NOTHING, true);
/// accumulate(&[f16::from_f32(60000.0), f16::from_f32(2.0)], &mut sum, Edit::NOTHING, false);
/// assert_eq!(sum, [120_000.0, 3.0]); // the first is beyond f16
/// ```
///
/// # Panics
/// If the lengths differ.
pub fn accumulate<E: Element>(source: &[E], sum: &mut [E::Wide], edit: Edit, is_first: bool) {
    assert_eq!(source.len(), sum.len(), "source and sum differ in length");
    if source.len() <= BLOCK {
        add_block(source, sum, edit, is_first);
    } else {
        source
            .par_chunks(BLOCK)
            .zip(sum.par_chunks_mut(BLOCK))
            .for_each(|(source, sum)| add_block(source, sum, edit, is_first));
    }
}

/// Writes `sum * coef` to `target`, rounded once. Parallel for more than one [`BLOCK`].
///
/// ```
/// use candle_grad_clip_kernels::round_into;
/// use half::f16;
///
/// let mut target = [f16::ZERO];
/// round_into(&[120_000f32], &mut target, 0.5);
/// assert_eq!(target, [f16::from_f32(60000.0)]);
/// ```
///
/// # Panics
/// If the lengths differ.
pub fn round_into<E: Element>(sum: &[E::Wide], target: &mut [E], coef: f64) {
    assert_eq!(sum.len(), target.len(), "sum and target differ in length");
    let coef = E::Wide::from_f64(coef);
    if sum.len() <= BLOCK {
        dispatch(Round(sum, target, coef));
    } else {
        sum.par_chunks(BLOCK)
            .zip(target.par_chunks_mut(BLOCK))
            .for_each(|(sum, target)| dispatch(Round(sum, target, coef)));
    }
}

fn add_block<E: Element>(source: &[E], sum: &mut [E::Wide], edit: Edit, is_first: bool) {
    specialise!(edit, op => dispatch(Add { source, sum, op, is_first }));
}

struct Add<'a, E: Element, F> {
    source: &'a [E],
    sum: &'a mut [E::Wide],
    op: F,
    is_first: bool,
}

impl<E: Element, F: ElementEdit> NullaryFnOnce for Add<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        if self.is_first {
            return E::widen(self.source, self.sum, self.op);
        }
        let mut buffer = [E::Wide::default(); CHUNK];
        for (source, sum) in self.source.chunks(CHUNK).zip(self.sum.chunks_mut(CHUNK)) {
            let wide = &mut buffer[..source.len()];
            E::widen(source, wide, self.op);
            for (sum, x) in sum.iter_mut().zip(&*wide) {
                *sum = *sum + *x;
            }
        }
    }
}

struct Round<'a, E: Element>(&'a [E::Wide], &'a mut [E], E::Wide);

impl<E: Element> NullaryFnOnce for Round<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self(sum, target, coef) = self;
        let mut buffer = [E::Wide::default(); CHUNK];
        for (sum, target) in sum.chunks(CHUNK).zip(target.chunks_mut(CHUNK)) {
            let scaled = &mut buffer[..sum.len()];
            for (scaled, x) in scaled.iter_mut().zip(sum) {
                *scaled = *x * coef;
            }
            E::narrow(scaled, target);
        }
    }
}
