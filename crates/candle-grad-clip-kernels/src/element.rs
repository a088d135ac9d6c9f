use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::half_conversions::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::simd::has_512_bits;
use crate::wide::Wide;

/// Elements of the stack buffer for widened half-precision values.
const WIDEN: usize = 256;

/// A floating-point dtype of gradients: f32, f64, f16 or bf16.
///
/// ```
/// use candle_grad_clip_kernels::{Element, NormType, measure};
/// use half::bf16;
///
/// fn l1<E: Element>(values: &[E]) -> f64 {
///     measure(values, NormType::L1).power.root(NormType::L1).value()
/// }
/// assert_eq!(l1(&[3f64, -4.0]), l1(&[bf16::from_f32(3.0), bf16::from_f32(-4.0)]));
/// ```
pub trait Element: Copy + Send + Sync + sealed::Sealed + 'static {
    /// `|x|` as an integer with the same order; infinity and NaN are above all finite values.
    type Bits: Copy + Ord + Default;
    /// The bits of infinity. Finite elements are below.
    const INFINITY: Self::Bits;
    /// Whether squares of this dtype are exact in f64, and their sums can't overflow there.
    const EXACT_SQUARES: bool;

    /// The dtype in which optimizer steps for this dtype are computed.
    type Wide: Wide;

    /// The bits of `|x|`.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::Element;
    /// assert!((-3f32).abs_bits() > 2f32.abs_bits());
    /// assert!(f32::NAN.abs_bits() > <f32 as Element>::INFINITY);
    /// ```
    fn abs_bits(self) -> Self::Bits;
    /// The value behind [`Element::abs_bits`].
    ///
    /// ```
    /// # use candle_grad_clip_kernels::Element;
    /// assert_eq!(f32::from_abs_bits((-3f32).abs_bits()), 3.0);
    /// ```
    fn from_abs_bits(bits: Self::Bits) -> f64;
    /// Widens, exactly.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::Element;
    /// assert_eq!(Element::to_f64(half::f16::from_f32(0.5)), 0.5);
    /// ```
    fn to_f64(self) -> f64;
    /// `x` rounded to this dtype as an edit rounds: half-precision dtypes via f32.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::Element;
    /// assert_eq!(<f32 as Element>::round(0.1), f64::from(0.1f32));
    /// ```
    fn round(x: f64) -> f64;
    /// Edits every element in place.
    fn map(values: &mut [Self], op: impl ElementEdit);
    /// Writes the edited elements of `source` to `target`. Both have the same length.
    fn map_into(source: &[Self], target: &mut [Self], op: impl ElementEdit);
    /// Writes the edited elements of `source` to `target` without rounding. Both have the same
    /// length.
    fn widen(source: &[Self], target: &mut [Self::Wide], op: impl ElementEdit);
    /// Rounds `source` into `target`. Both have the same length.
    fn narrow(source: &[Self::Wide], target: &mut [Self]);
    /// Sets each element of `wide` that does not round to its element of `values` to that element.
    /// Both have the same length.
    fn renew(values: &[Self], wide: &mut [Self::Wide]);
    /// The elements themselves, if this dtype is its own compute dtype.
    fn as_wide(values: &mut [Self]) -> Option<&mut [Self::Wide]>;
}

/// The edit of one element, in the two compute dtypes.
pub trait ElementEdit: Copy {
    /// For f64.
    fn f64(self, x: f64) -> f64;
    /// For f32, f16 and bf16.
    fn f32(self, x: f32) -> f32;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// The items that f32 and f64 share, except for a few names.
macro_rules! full_width {
    ($t:ident, $bits:ty, $fit:expr) => {
        impl Element for $t {
            type Bits = $bits;
            const INFINITY: $bits = $t::INFINITY.to_bits();
            const EXACT_SQUARES: bool = $fit;
            type Wide = $t;

            #[inline(always)]
            fn abs_bits(self) -> $bits {
                self.abs().to_bits()
            }
            #[inline(always)]
            #[allow(clippy::cast_lossless)]
            fn from_abs_bits(bits: $bits) -> f64 {
                $t::from_bits(bits) as f64
            }
            #[inline(always)]
            #[allow(clippy::cast_lossless)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            #[allow(clippy::cast_lossless)]
            fn round(x: f64) -> f64 {
                x as $t as f64
            }
            #[inline(always)]
            fn map(values: &mut [Self], op: impl ElementEdit) {
                for x in values {
                    *x = op.$t(*x);
                }
            }
            #[inline(always)]
            fn map_into(source: &[Self], target: &mut [Self], op: impl ElementEdit) {
                for (y, x) in target.iter_mut().zip(source) {
                    *y = op.$t(*x);
                }
            }
            #[inline(always)]
            fn widen(source: &[Self], target: &mut [Self], op: impl ElementEdit) {
                Self::map_into(source, target, op);
            }
            #[inline(always)]
            fn narrow(source: &[Self], target: &mut [Self]) {
                target.copy_from_slice(source);
            }
            #[inline(always)]
            fn renew(values: &[Self], wide: &mut [Self]) {
                wide.copy_from_slice(values);
            }
            #[inline(always)]
            fn as_wide(values: &mut [Self]) -> Option<&mut [Self]> {
                Some(values)
            }
        }
    };
}

full_width!(f32, u32, true);
full_width!(f64, u64, false);

impl Element for bf16 {
    type Bits = u16;
    const INFINITY: u16 = bf16::INFINITY.to_bits();
    const EXACT_SQUARES: bool = true;
    type Wide = f32;

    #[inline(always)]
    fn abs_bits(self) -> u16 {
        self.to_bits() & 0x7fff
    }
    #[inline(always)]
    fn from_abs_bits(bits: u16) -> f64 {
        bf16_to_f32(bits).into()
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        bf16_to_f32(self.to_bits()).into()
    }
    #[inline(always)]
    fn round(x: f64) -> f64 {
        bf16::from_f32(x as f32).to_f64()
    }
    #[inline(always)]
    fn map(values: &mut [Self], op: impl ElementEdit) {
        for x in values {
            *x = f32_to_bf16(op.f32(bf16_to_f32(x.to_bits())));
        }
    }
    #[inline(always)]
    fn map_into(source: &[Self], target: &mut [Self], op: impl ElementEdit) {
        for (y, x) in target.iter_mut().zip(source) {
            *y = f32_to_bf16(op.f32(bf16_to_f32(x.to_bits())));
        }
    }
    #[inline(always)]
    fn widen(source: &[Self], target: &mut [f32], op: impl ElementEdit) {
        for (y, x) in target.iter_mut().zip(source) {
            *y = op.f32(bf16_to_f32(x.to_bits()));
        }
    }
    #[inline(always)]
    fn narrow(source: &[f32], target: &mut [Self]) {
        for (y, x) in target.iter_mut().zip(source) {
            *y = f32_to_bf16(*x);
        }
    }
    #[inline(always)]
    fn renew(values: &[Self], wide: &mut [f32]) {
        let differ = |x: &Self, y: f32| x.to_bits() ^ f32_to_bf16(y).to_bits();
        // Fast check: usually no element changes, because all are within half a ULP. (Ties and NaN
        // are checked one by one.)
        let away = |x: &Self, y: f32| {
            let bits = y.to_bits().wrapping_add(0x7fff);
            bits.wrapping_sub(u32::from(x.to_bits()) << 16)
        };
        let pairs = values.iter().zip(&*wide);
        if pairs.fold(0, |most, (x, y)| away(x, *y).max(most)) < 0xffff {
            return;
        }
        for (x, y) in values.iter().zip(wide) {
            if differ(x, *y) != 0 {
                *y = bf16_to_f32(x.to_bits());
            }
        }
    }
    #[inline(always)]
    fn as_wide(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

impl Element for f16 {
    type Bits = u16;
    const INFINITY: u16 = f16::INFINITY.to_bits();
    const EXACT_SQUARES: bool = true;
    type Wide = f32;

    #[inline(always)]
    fn abs_bits(self) -> u16 {
        self.to_bits() & 0x7fff
    }
    #[inline(always)]
    fn from_abs_bits(bits: u16) -> f64 {
        f16_to_f32(bits).into()
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f16_to_f32(self.to_bits()).into()
    }
    #[inline(always)]
    fn round(x: f64) -> f64 {
        f16::from_f32(x as f32).to_f64()
    }
    #[inline(always)]
    fn map(values: &mut [Self], op: impl ElementEdit) {
        let mut wide = [0f32; WIDEN];
        for values in values.chunks_mut(WIDEN) {
            let wide = &mut wide[..values.len()];
            Self::widen(values, wide, op);
            Self::narrow(wide, values);
        }
    }
    #[inline(always)]
    fn map_into(source: &[Self], target: &mut [Self], op: impl ElementEdit) {
        let mut wide = [0f32; WIDEN];
        for (source, target) in source.chunks(WIDEN).zip(target.chunks_mut(WIDEN)) {
            let wide = &mut wide[..source.len()];
            Self::widen(source, wide, op);
            Self::narrow(wide, target);
        }
    }
    #[inline(always)]
    fn widen(source: &[Self], target: &mut [f32], op: impl ElementEdit) {
        for (y, x) in target.iter_mut().zip(source) {
            *y = op.f32(f16_to_f32(x.to_bits()));
        }
    }
    #[inline(always)]
    fn narrow(source: &[f32], target: &mut [Self]) {
        // `half` has an instruction for 8 elements, but calls it 8 by 8.
        if !has_512_bits() {
            return target.convert_from_f32_slice(source);
        }
        for (y, x) in target.iter_mut().zip(source) {
            *y = f32_to_f16(*x);
        }
    }
    #[inline(always)]
    fn renew(values: &[Self], wide: &mut [f32]) {
        let mut rounded = [f16::ZERO; WIDEN];
        for (values, wide) in values.chunks(WIDEN).zip(wide.chunks_mut(WIDEN)) {
            let rounded = &mut rounded[..values.len()];
            Self::narrow(wide, rounded);
            let differ = |(x, y): (&Self, &Self)| x.to_bits() ^ y.to_bits();
            if values
                .iter()
                .zip(&*rounded)
                .map(differ)
                .fold(0, |any, x| any | x)
                == 0
            {
                continue;
            }
            for ((x, y), wide) in values.iter().zip(&*rounded).zip(wide) {
                if differ((x, y)) != 0 {
                    *wide = f16_to_f32(x.to_bits());
                }
            }
        }
    }
    #[inline(always)]
    fn as_wide(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}
