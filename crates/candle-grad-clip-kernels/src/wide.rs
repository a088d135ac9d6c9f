use std::ops::{Add, Div, Mul, Sub};

/// A compute dtype of optimizer steps: f32 (for f32, f16 and bf16 parameters) or f64.
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
    /// The smallest effective `eps` of [`AdamW`](crate::AdamW). A smaller one would not bound the
    /// update: squares of gradients below about this value underflow.
    const SMALLEST_EPS: f64;
    /// Rounds once.
    fn from_f64(x: f64) -> Self;
    /// The square root, correctly rounded.
    #[must_use]
    fn sqrt(self) -> Self;
    /// The elements of a buffer, if they have this dtype.
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

/// Values of one of the two [`Wide`] dtypes: the optimizer state of one parameter.
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
