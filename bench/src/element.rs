//! The dtypes, and the two plain loops over a slice of each that the floor is made of.
//!
//! The compiler spreads both over several vector registers. What goes into `dispatch` is inlined by
//! force, or it would be compiled for the baseline CPU.
#![allow(clippy::inline_always)]

use candle_core::{CpuStorage, WithDType};
use half::bf16;
use pulp::Arch;

/// A dtype that is timed.
pub(crate) trait Element: WithDType {
    /// Whether steps are timed: moments are f32.
    const HAS_STEPS: bool;
    /// The elements of a tensor's memory, if they are of this dtype.
    fn values(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    /// Reads every element and does the least with it: an exclusive or of the bits.
    fn read(values: &[Self]) -> u64;
    /// Multiplies every element, in this dtype's own arithmetic (bf16's is f32).
    fn scale(values: &mut [Self], coef: f64);
    /// Reads all four and writes all but the gradient, with the least arithmetic.
    fn step(params: &mut [Self], grads: &[Self], first: &mut [f32], second: &mut [f32]);
    /// Reads both and writes the parameters, with the least arithmetic.
    fn descend(params: &mut [Self], grads: &[Self]);
}

/// What the floor's steps multiply by: small, so that nothing overflows in any number of steps.
const SMALL: f32 = 1e-6;

macro_rules! element {
    ($t:ty, $storage:ident, $widen:expr, $narrow:expr, $scaled:expr) => {
        impl Element for $t {
            const HAS_STEPS: bool = size_of::<$t>() <= 4;

            fn values(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$storage(values) => Some(values),
                    _ => None,
                }
            }

            #[allow(clippy::cast_lossless)] // From u64 to u64 for one of the three.
            fn read(values: &[Self]) -> u64 {
                Arch::new().dispatch(
                    #[inline(always)]
                    || values.iter().fold(0, |all, x| all ^ x.to_bits()) as u64,
                )
            }

            fn step(params: &mut [Self], grads: &[Self], first: &mut [f32], second: &mut [f32]) {
                let (widen, narrow) = ($widen, $narrow);
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        let moments = first.iter_mut().zip(second);
                        for ((p, g), (m, v)) in params.iter_mut().zip(grads).zip(moments) {
                            let g = widen(*g) * SMALL;
                            *m += g;
                            *v += g;
                            *p = narrow(widen(*p) - *m);
                        }
                    },
                );
            }

            fn descend(params: &mut [Self], grads: &[Self]) {
                let (widen, narrow) = ($widen, $narrow);
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for (p, g) in params.iter_mut().zip(grads) {
                            *p = narrow(widen(*p) - widen(*g) * SMALL);
                        }
                    },
                );
            }

            fn scale(values: &mut [Self], coef: f64) {
                let scaled = $scaled;
                Arch::new().dispatch(
                    #[inline(always)]
                    || {
                        for x in values {
                            *x = scaled(*x, coef);
                        }
                    },
                );
            }
        }
    };
}

element!(f32, F32, |x: f32| x, |x: f32| x, |x: f32, coef: f64| x
    * coef as f32);
element!(
    f64,
    F64,
    |x: f64| x as f32,
    f64::from,
    |x: f64, coef: f64| x * coef
);
element!(bf16, BF16, widen_bf16, narrow_bf16, |x: bf16, coef: f64| {
    narrow_bf16(widen_bf16(x) * coef as f32)
});

// Widened and rounded to the nearest even by shifts, which vectorise. Nothing here is NaN.

#[inline(always)]
fn widen_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

#[inline(always)]
fn narrow_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    bf16::from_bits(((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_sees_every_element() {
        for len in [1, 127, 128, 129, 1000] {
            let mut values = vec![0f32; len];
            for i in 0..len {
                values[i] = 1.0;
                assert_eq!(
                    f32::read(&values),
                    u64::from(1f32.to_bits()),
                    "{i} of {len}"
                );
                values[i] = 0.0;
            }
        }
    }

    #[test]
    fn scaling_bf16_rounds_as_half_does() {
        let values: Vec<bf16> = (0..1000i16)
            .map(|i| bf16::from_f32(f32::from(i - 500)))
            .collect();
        let mut scaled = values.clone();
        bf16::scale(&mut scaled, 0.7);
        for (x, y) in values.iter().zip(scaled) {
            assert_eq!(y, bf16::from_f32(x.to_f32() * 0.7));
        }
    }
}
