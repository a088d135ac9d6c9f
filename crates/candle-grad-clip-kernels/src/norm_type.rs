/// Which norm: `(sum |g|^p)^(1/p)` for a `p` above zero, or the largest `|g|`.
///
/// The same choices as `norm_type` of `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15), but for
/// `p <= 0`, which PyTorch takes and which is not a norm.
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
    /// Sum of absolute values.
    L1,
    /// Euclidean norm: root of the sum of squares.
    #[default]
    L2,
    /// Largest absolute value.
    Inf,
    /// `(sum |g|^p)^(1/p)`; `p` must be above zero.
    P(f64),
}

impl NormType {
    /// The exponent: 1, 2, infinity, or that of [`NormType::P`].
    #[must_use]
    pub fn p(self) -> f64 {
        match self {
            Self::L1 => 1.0,
            Self::L2 => 2.0,
            Self::Inf => f64::INFINITY,
            Self::P(p) => p,
        }
    }

    /// Whether the exponent makes a norm: above zero and not NaN.
    #[must_use]
    pub fn is_valid(self) -> bool {
        self.p() > 0.0
    }
}

/// 1, 2 and infinity become [`NormType::L1`], [`NormType::L2`] and [`NormType::Inf`].
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
