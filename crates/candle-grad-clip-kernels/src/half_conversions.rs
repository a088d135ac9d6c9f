//! Conversions between the half-precision dtypes and f32, one element each. Those of `half` branch on
//! NaN, so the compiler can't vectorise a loop of them. These use selects instead, and have the same
//! bits.

use half::{bf16, f16};

#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds to nearest, ties to even. NaN stays NaN.
#[inline(always)]
pub(crate) fn f32_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet_nan } else { rounded } as u16)
}

#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let normal = magnitude + ((127 - 15) << 23);
    let special = magnitude + ((255 - 31) << 23);
    // A subnormal m * 2^-24: add m to the mantissa of 2^-14, then subtract 2^-14.
    let subnormal = f32::from_bits(magnitude + (113 << 23)) - f32::from_bits(113 << 23);
    let exponent = bits & 0x7c00;
    let value = if exponent == 0x7c00 {
        special
    } else if exponent == 0 {
        subnormal.to_bits()
    } else {
        normal
    };
    f32::from_bits(value | (u32::from(bits & 0x8000) << 16))
}

/// Rounds to nearest, ties to even. NaN stays NaN.
#[inline(always)]
pub(crate) fn f32_to_f16(x: f32) -> f16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let rounded = magnitude.wrapping_add(0xfff + ((magnitude >> 13) & 1));
    let normal = (rounded.wrapping_sub((127 - 15) << 23) >> 13).min(0x7c00);
    // At 0.5 a ULP of f32 is 2^-24, the smallest f16, so the addition rounds.
    let subnormal = (f32::from_bits(magnitude) + 0.5)
        .to_bits()
        .wrapping_sub(0.5f32.to_bits());
    let quiet_nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
    let value = if x.is_nan() {
        quiet_nan
    } else if magnitude < (127 - 14) << 23 {
        subnormal
    } else {
        normal
    };
    f16::from_bits((value | ((bits >> 16) & 0x8000)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_conversions_equal_those_of_half_for_every_value() {
        for bits in 0..=u16::MAX {
            let (b, f) = (bf16::from_bits(bits), f16::from_bits(bits));
            if b.is_nan() {
                assert!(bf16_to_f32(bits).is_nan());
                assert!(f32_to_bf16(bf16_to_f32(bits)).is_nan());
            } else {
                assert_eq!(bf16_to_f32(bits).to_bits(), b.to_f32().to_bits());
                assert_eq!(f32_to_bf16(b.to_f32()).to_bits(), bits);
            }
            if f.is_nan() {
                assert!(f16_to_f32(bits).is_nan());
                assert!(f32_to_f16(f16_to_f32(bits)).is_nan());
            } else {
                assert_eq!(
                    f16_to_f32(bits).to_bits(),
                    f.to_f32().to_bits(),
                    "{bits:#x}"
                );
                assert_eq!(f32_to_f16(f.to_f32()).to_bits(), bits);
            }
        }
    }

    #[test]
    fn narrowing_rounds_as_half_does() {
        // Every sign and exponent, with mantissas around each rounding boundary of both dtypes.
        for high in 0..=u16::MAX {
            let bf16_lows = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
            let f16_lows = [0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001, 0xf000];
            for low in bf16_lows.into_iter().chain(f16_lows) {
                let x = f32::from_bits((u32::from(high) << 16) | low);
                let (b, f) = (f32_to_bf16(x), f32_to_f16(x));
                if x.is_nan() {
                    assert!(b.is_nan() && f.is_nan());
                } else {
                    assert_eq!(b.to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
                    assert_eq!(f.to_bits(), f16::from_f32(x).to_bits(), "{x:e}");
                }
            }
        }
    }
}
