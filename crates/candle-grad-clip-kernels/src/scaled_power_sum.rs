use crate::norm_type::NormType;

/// `scale^p * sum`: the sum of `|g|^p` over some elements, with a separate scale.
///
/// `1e200^2` overflows f64 and `1e-200^2` underflows, so the sum is taken over `|g| / scale`. For
/// [`NormType::Inf`], `scale` is the largest `|g|` and `sum` is 1 (or 0 if all are zero). Blocks,
/// Vars and devices exchange norms in this form only.
///
/// ```
/// use candle_grad_clip_kernels::{NormType, measure};
///
/// let power = measure(&[3e200, 4e200], NormType::L2).power; // squares that no f64 holds
/// assert!(power.scale > 1.0 && power.sum.is_finite());
/// assert!((power.root(NormType::L2).value() / 5e200 - 1.0).abs() < 1e-12);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScaledPowerSum {
    /// The divisor of the elements.
    pub scale: f64,
    /// The sum of `(|g| / scale)^p`.
    pub sum: f64,
}

impl ScaledPowerSum {
    /// The power sum of no elements.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{NormType, ScaledPowerSum};
    /// let power = ScaledPowerSum { scale: 1.0, sum: 9.0 };
    /// assert_eq!(ScaledPowerSum::ZERO.merge(power, NormType::L2), power);
    /// ```
    pub const ZERO: Self = Self {
        scale: 1.0,
        sum: 0.0,
    };

    /// The power sum of both sets of elements. The last bit depends on the order: fold in a fixed
    /// order.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{NormType, ScaledPowerSum};
    /// let (three, four) = (ScaledPowerSum { scale: 3.0, sum: 1.0 }, ScaledPowerSum { scale: 1.0, sum: 16.0 });
    /// let norm = three.merge(four, NormType::L2).root(NormType::L2).value();
    /// assert!((norm - 5.0).abs() < 1e-15);
    /// ```
    #[must_use]
    #[inline]
    pub fn merge(self, other: Self, norm_type: NormType) -> Self {
        if other.sum == 0.0 {
            return self;
        }
        if self.sum == 0.0 {
            return other;
        }
        let (large, small) = if self.scale >= other.scale {
            (self, other)
        } else {
            (other, self)
        };
        match norm_type {
            NormType::Inf => large,
            _ if large.scale == small.scale => Self {
                scale: large.scale,
                sum: large.sum + small.sum,
            },
            _ => {
                let ratio = small.scale / large.scale;
                let factor = match norm_type {
                    NormType::L1 => ratio,
                    NormType::L2 => ratio * ratio,
                    _ => ratio.powf(norm_type.p()),
                };
                let sum = large.sum + small.sum * factor;
                // The factor underflows only below 1e-308, and the larger sum is at least 1e-270
                // then, so the lost term is negligible.
                Self {
                    scale: large.scale,
                    sum,
                }
            }
        }
    }

    /// The p-th root.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{NormType, ScaledPowerSum};
    /// let power = ScaledPowerSum { scale: 10.0, sum: 4.0 };
    /// assert_eq!(power.root(NormType::L2).value(), 20.0);
    /// ```
    #[must_use]
    #[inline]
    pub fn root(self, norm_type: NormType) -> Norm {
        if self.sum == 0.0 {
            return Norm::ZERO;
        }
        let root = match norm_type {
            NormType::L1 => self.sum,
            NormType::L2 => self.sum.sqrt(),
            NormType::Inf => 1.0,
            NormType::P(p) => self.sum.powf(p.recip()),
        };
        Norm {
            scale: self.scale,
            root,
        }
    }
}

/// A norm as two factors, `scale * root`, since it can exceed the maximum of f64 even if every
/// element is finite.
///
/// ```
/// use candle_grad_clip_kernels::{NormType, measure};
///
/// let norm = measure(&[f64::MAX; 4], NormType::L2).power.root(NormType::L2);
/// assert_eq!(norm.value(), f64::INFINITY); // 2 f64::MAX
/// assert!((norm.scaled(norm.clip_coef(1.0, 0.0)) - 1.0).abs() < 1e-12); // clipped all the same
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// The first factor.
    pub scale: f64,
    /// The second factor.
    pub root: f64,
}

impl Norm {
    /// The norm of no elements.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::Norm;
    /// assert_eq!(Norm::ZERO.value(), 0.0);
    /// ```
    pub const ZERO: Self = Self {
        scale: 1.0,
        root: 0.0,
    };

    /// A norm from a known number.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::Norm;
    /// assert_eq!(Norm::known(5.0).value(), 5.0);
    /// ```
    #[must_use]
    #[inline]
    pub fn known(value: f64) -> Self {
        Self {
            scale: 1.0,
            root: value,
        }
    }

    /// The norm as one number: infinite if it exceeds the maximum of f64.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::Norm;
    /// assert_eq!(Norm { scale: 4.0, root: 1.5 }.value(), 6.0);
    /// assert_eq!(Norm { scale: f64::MAX, root: 2.0 }.value(), f64::INFINITY);
    /// ```
    #[must_use]
    #[inline]
    pub fn value(self) -> f64 {
        self.scale * self.root
    }

    /// `min(1, max_norm / (norm + eps))`, also correct if the norm overflows f64.
    ///
    /// An infinite `max_norm` gives 1, and a `max_norm` of 0 gives 0, also for a zero norm.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::Norm;
    /// assert_eq!(Norm::known(5.0).clip_coef(1.0, 0.0), 0.2);
    /// assert_eq!(Norm::known(0.5).clip_coef(1.0, 0.0), 1.0); // nothing to clip
    /// ```
    #[must_use]
    #[inline]
    pub fn clip_coef(self, max_norm: f64, eps: f64) -> f64 {
        if max_norm == f64::INFINITY {
            return 1.0;
        }
        self.coef_to(max_norm, eps).min(1.0)
    }

    /// `length / (norm + eps)`: the factor that gives the elements the norm `length`. It may be
    /// above 1. Also correct if the norm overflows f64.
    ///
    /// A `length` of 0 gives 0, also for a zero norm.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::Norm;
    /// assert_eq!(Norm::known(5.0).coef_to(1.0, 0.0), 0.2);
    /// assert_eq!(Norm::known(0.5).coef_to(1.0, 0.0), 2.0);
    /// ```
    #[must_use]
    #[inline]
    pub fn coef_to(self, length: f64, eps: f64) -> f64 {
        if length == 0.0 {
            return 0.0;
        }
        let value = self.value();
        if value.is_finite() {
            length / (value + eps)
        } else {
            length / self.scale / self.root
        }
    }

    /// The norm after scaling by `clip_coef`; 0 for a coefficient of 0.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::Norm;
    /// assert_eq!(Norm::known(8.0).scaled(0.5), 4.0);
    /// assert_eq!(Norm { scale: f64::MAX, root: 2.0 }.scaled(0.25), f64::MAX / 2.0);
    /// ```
    #[must_use]
    #[inline]
    pub fn scaled(self, clip_coef: f64) -> f64 {
        if clip_coef == 0.0 {
            0.0
        } else {
            // This order avoids infinity for a norm that exceeds the maximum of f64.
            self.scale * clip_coef * self.root
        }
    }
}
