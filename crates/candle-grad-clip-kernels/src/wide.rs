use std::ops::{Add, Div, Mul, Sub};

/// A dtype that optimizer steps are computed in: f32 (for f32, f16 and bf16 parameters) or f64.
pub trait Wide:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + sealed::Sealed
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + 'static
{
    /// Where a smaller `eps` of [`AdamW`](crate::AdamW) would no longer bound the update: squares
    /// of gradients below about this are 0 here.
    const SMALLEST_EPS: f64;
    /// Rounds once.
    fn from_f64(x: f64) -> Self;
    /// The square root, correctly rounded.
    #[must_use]
    fn sqrt(self) -> Self;
    /// The elements of a buffer, if they are of this dtype.
    fn of(values: &mut WideVec) -> Option<&mut [Self]>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

macro_rules! wide {
    ($t:ident, $variant:ident, $smallest_eps:literal) => {
        impl Wide for $t {
            const SMALLEST_EPS: f64 = $smallest_eps;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                $t::sqrt(self)
            }
            fn of(values: &mut WideVec) -> Option<&mut [Self]> {
                match values {
                    WideVec::$variant(values) => Some(values),
                    _ => None,
                }
            }
        }
    };
}

wide!(f32, F32, 1e-20);
wide!(f64, F64, 1e-150);

/// Numbers of one of the two [`Wide`] dtypes: an optimizer's state for one parameter.
///
/// ```
/// use candle_grad_clip_kernels::{Wide, WideVec};
///
/// let mut state = WideVec::F32(vec![0.0; 3]);
/// assert_eq!(f32::of(&mut state), Some(&mut [0.0; 3][..]));
/// assert!(f64::of(&mut state).is_none());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub enum WideVec {
    /// For f32, f16 and bf16 parameters.
    F32(Vec<f32>),
    /// For f64 parameters.
    F64(Vec<f64>),
}
