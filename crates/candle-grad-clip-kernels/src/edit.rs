use crate::element::ElementEdit;

/// The edit of every element.
///
/// ```
/// use candle_grad_clip_kernels::{Edit, edit};
///
/// let mut values = [3f32, -4.0, f32::INFINITY];
/// edit(&mut values, Edit::Scale { clip_coef: 0.5, zero_non_finite: true });
/// assert_eq!(values, [1.5, -2.0, 0.0]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Edit {
    /// `x * clip_coef`, in f64 for f64 and in f32 for the others; half-precision elements are
    /// widened first. A coefficient below f32's normal range is applied as two factors, so that it
    /// does not become 0.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{Edit, edit};
    /// # use half::f16;
    /// let mut values = [f16::from_f32(60000.0)];
    /// edit(&mut values, Edit::Scale { clip_coef: 1e-8, zero_non_finite: false });
    /// assert!((values[0].to_f64() / 6e-4 - 1.0).abs() < 1e-3); // 1e-8 itself is 0 in f16
    /// ```
    Scale {
        /// The coefficient.
        clip_coef: f64,
        /// Whether NaN and infinite elements become 0. Otherwise IEEE rules apply.
        zero_non_finite: bool,
    },
    /// Clamps to `[-clip_value, clip_value]`, then multiplies by `clip_coef` like [`Edit::Scale`].
    /// Infinite elements become the bound and NaN stays NaN.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{Edit, edit};
    /// let mut values = [f32::NEG_INFINITY, 2.0, f32::NAN];
    /// edit(&mut values, Edit::Clamp { clip_value: 4.0, clip_coef: 0.25, zero_non_finite: false });
    /// assert_eq!(values[..2], [-1.0, 0.5]);
    /// assert!(values[2].is_nan());
    /// ```
    Clamp {
        /// The bound.
        clip_value: f64,
        /// The coefficient.
        clip_coef: f64,
        /// Whether NaN and infinite elements become 0 instead.
        zero_non_finite: bool,
    },
}

impl Edit {
    /// Leaves every element unchanged.
    pub const NOTHING: Self = Self::Scale {
        clip_coef: 1.0,
        zero_non_finite: false,
    };

    /// The equivalent edit for elements that are still multiplied by `scale`: it also unscales
    /// them. Exact if `scale` is a power of two.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{Edit, edit};
    /// let clamp = Edit::Clamp { clip_value: 1.5, clip_coef: 1.0, zero_non_finite: false };
    /// let mut scaled = [1024.0, 2048.0];
    /// edit(&mut scaled, clamp.unscaling(1024.0));
    /// assert_eq!(scaled, [1.0, 1.5]);
    /// ```
    #[must_use]
    pub fn unscaling(mut self, scale: f64) -> Self {
        match &mut self {
            Self::Scale { clip_coef, .. } => *clip_coef /= scale,
            Self::Clamp {
                clip_value,
                clip_coef,
                ..
            } => {
                *clip_value *= scale;
                *clip_coef /= scale;
            }
        }
        self
    }
}

/// Splits a coefficient into two factors for f32. The second is 1, unless the coefficient is below
/// f32's normal range, where one factor would lose bits or become 0.
///
/// ```
/// use candle_grad_clip_kernels::coef_factors;
///
/// assert_eq!(coef_factors(0.5), [0.5, 1.0]);
/// let [a, b] = coef_factors(1e-60);
/// assert!(1e-60 as f32 == 0.0 && a as f32 > 0.0 && b as f32 > 0.0);
/// ```
#[must_use]
#[inline]
pub fn coef_factors(coef: f64) -> [f64; 2] {
    if is_tiny(coef) {
        let root = coef.abs().sqrt();
        [root, root.copysign(coef)]
    } else {
        [coef, 1.0]
    }
}

/// Whether f32 can't hold the coefficient with all its bits.
#[inline(always)]
pub(crate) fn is_tiny(coef: f64) -> bool {
    coef != 0.0 && coef.abs() < f64::from(f32::MIN_POSITIVE)
}

/// Widens without an edit.
#[derive(Clone, Copy)]
pub(crate) struct AsIs;

impl ElementEdit for AsIs {
    #[inline(always)]
    fn f64(self, x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn f32(self, x: f32) -> f32 {
        x
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Scale {
    clip_coef: f64,
    /// The coefficient in f32 as two factors; the second is 1 unless it is below f32's normal
    /// range.
    factors: [f32; 2],
}

impl Scale {
    pub(crate) fn new(clip_coef: f64) -> Self {
        let factors = coef_factors(clip_coef).map(|factor| factor as f32);
        Self { clip_coef, factors }
    }
}

impl ElementEdit for Scale {
    #[inline(always)]
    fn f64(self, x: f64) -> f64 {
        x * self.clip_coef
    }
    #[inline(always)]
    fn f32(self, x: f32) -> f32 {
        x * self.factors[0] * self.factors[1]
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Clamp {
    clip_value: f64,
    scale: Scale,
}

impl Clamp {
    pub(crate) fn new(clip_value: f64, clip_coef: f64) -> Self {
        let scale = Scale::new(clip_coef);
        Self { clip_value, scale }
    }
}

impl ElementEdit for Clamp {
    #[inline(always)]
    fn f64(self, x: f64) -> f64 {
        self.scale.f64(clamp(x, self.clip_value))
    }
    #[inline(always)]
    fn f32(self, x: f32) -> f32 {
        self.scale.f32(clamp(x, self.clip_value as f32))
    }
}

/// `clamp` of the standard library without its panic. NaN stays NaN.
#[inline(always)]
fn clamp<T: Copy + PartialOrd + std::ops::Neg<Output = T>>(x: T, bound: T) -> T {
    if x > bound {
        bound
    } else if x < -bound {
        -bound
    } else {
        x
    }
}

/// Maps non-finite elements to 0 and applies the inner edit to the others.
#[derive(Clone, Copy)]
pub(crate) struct Finite<F>(pub(crate) F);

impl<F: ElementEdit> ElementEdit for Finite<F> {
    #[inline(always)]
    fn f64(self, x: f64) -> f64 {
        if x.is_finite() { self.0.f64(x) } else { 0.0 }
    }
    #[inline(always)]
    fn f32(self, x: f32) -> f32 {
        if x.is_finite() { self.0.f32(x) } else { 0.0 }
    }
}

/// Evaluates `$body` with `$op` bound to the type that implements `$edit`.
macro_rules! specialise {
    ($edit:expr, $op:ident => $body:expr) => {
        match $edit {
            $crate::edit::Edit::Scale {
                clip_coef,
                zero_non_finite: false,
            } => {
                let $op = $crate::edit::Scale::new(clip_coef);
                $body
            }
            $crate::edit::Edit::Scale {
                clip_coef,
                zero_non_finite: true,
            } => {
                let $op = $crate::edit::Finite($crate::edit::Scale::new(clip_coef));
                $body
            }
            $crate::edit::Edit::Clamp {
                clip_value,
                clip_coef,
                zero_non_finite: false,
            } => {
                let $op = $crate::edit::Clamp::new(clip_value, clip_coef);
                $body
            }
            $crate::edit::Edit::Clamp {
                clip_value,
                clip_coef,
                zero_non_finite: true,
            } => {
                let $op = $crate::edit::Finite($crate::edit::Clamp::new(clip_value, clip_coef));
                $body
            }
        }
    };
}
pub(crate) use specialise;
