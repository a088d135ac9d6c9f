/// The type of a norm: `(sum |g|^p)^(1/p)` for `p > 0`, or the largest `|g|`.
///
/// The choices are those of `norm_type` in `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15), except
/// that PyTorch also accepts `p <= 0`, which does not define a norm.
///
/// ```
/// use candle_grad_clip_kernels::{NormType, measure};
///
/// assert_eq!(NormType::from(2.0), NormType::L2);
/// let norm = measure(&[3f32, -4.0], NormType::Inf).power.root(NormType::Inf);
/// assert_eq!(norm.value(), 4.0);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum NormType {
    /// The sum of absolute values.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{NormType, measure};
    /// let norm = measure(&[3f32, -4.0], NormType::L1).power.root(NormType::L1);
    /// assert_eq!(norm.value(), 7.0);
    /// ```
    L1,
    /// The Euclidean norm: the root of the sum of squares.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{NormType, measure};
    /// let norm = measure(&[3f32, -4.0], NormType::L2).power.root(NormType::L2);
    /// assert_eq!(norm.value(), 5.0);
    /// ```
    #[default]
    L2,
    /// The largest absolute value.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{NormType, measure};
    /// let norm = measure(&[3f32, -4.0], NormType::Inf).power.root(NormType::Inf);
    /// assert_eq!(norm.value(), 4.0);
    /// ```
    Inf,
    /// `(sum |g|^p)^(1/p)`; `p` must be above zero.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::{NormType, measure};
    /// let half = NormType::P(0.5);
    /// let norm = measure(&[1f64, 4.0], half).power.root(half);
    /// assert_eq!(norm.value(), 9.0); // (1 + 2)^2
    /// ```
    P(f64),
}

impl NormType {
    /// The exponent: 1, 2, infinity, or that of [`NormType::P`].
    ///
    /// ```
    /// # use candle_grad_clip_kernels::NormType;
    /// assert_eq!((NormType::L1.p(), NormType::P(1.5).p()), (1.0, 1.5));
    /// ```
    #[must_use]
    pub fn p(self) -> f64 {
        match self {
            Self::L1 => 1.0,
            Self::L2 => 2.0,
            Self::Inf => f64::INFINITY,
            Self::P(p) => p,
        }
    }

    /// Whether the exponent is valid: above zero and not NaN.
    ///
    /// ```
    /// # use candle_grad_clip_kernels::NormType;
    /// assert!(NormType::Inf.is_valid());
    /// assert!(!NormType::from(0.0).is_valid() && !NormType::from(f64::NAN).is_valid());
    /// ```
    #[must_use]
    pub fn is_valid(self) -> bool {
        self.p() > 0.0
    }
}

/// Maps 1, 2 and infinity to [`NormType::L1`], [`NormType::L2`] and [`NormType::Inf`].
impl From<f64> for NormType {
    fn from(p: f64) -> Self {
        if p == 1.0 {
            Self::L1
        } else if p == 2.0 {
            Self::L2
        } else if p == f64::INFINITY {
            Self::Inf
        } else {
            Self::P(p)
        }
    }
}

impl std::fmt::Display for NormType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Inf => f.write_str("inf"),
            other => write!(f, "{}", other.p()),
        }
    }
}
