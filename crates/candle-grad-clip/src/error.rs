use candle_core::DType;

use crate::NormType;

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong. Whatever it is, weights, optimizer state and gradients are as they were (but for
/// an inner optimizer whose own `step` fails half way).
///
/// It converts into [`candle_core::Error`], which keeps the whole text (and only the text: use
/// [`ClippedOptimizer::step_report`](crate::ClippedOptimizer::step_report) for the typed error), so
/// `?` works in functions that return candle's `Result`, `anyhow`'s or this crate's.
///
/// ```
/// use candle_core::backprop::GradStore;
/// use candle_grad_clip::{Error, clip_grad_norm};
///
/// let error = clip_grad_norm(&mut GradStore::default(), &[], -1.0).unwrap_err();
/// assert!(matches!(error, Error::InvalidOption { name: "max_norm", .. }));
/// assert_eq!(error.to_string(), "max_norm is -1, expected 0 or above");
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A limit or option outside its range.
    #[error("{name} is {value}, expected {expected}")]
    InvalidOption {
        /// The field or argument.
        name: &'static str,
        /// What came.
        value: f64,
        /// The allowed range, and what to do.
        expected: &'static str,
    },
    /// A norm order that makes no norm.
    #[error("norm_type is {p}, expected 1, 2, inf or any p > 0")]
    InvalidNormType {
        /// The exponent that came.
        p: f64,
    },
    /// NaN or infinite gradients, under [`NonFinite::Error`](crate::NonFinite::Error).
    #[error(
        "the gradients are not finite, so their {norm_type}-norm is not either: the first bad Var \
         is {var} with {nan} NaN and {infinite} infinite of {elements} values ({total} bad values \
         in all); nothing was changed; look at the data and the learning rate, or take another \
         NonFinite policy"
    )]
    NonFinite {
        /// Name of the first Var whose gradient is bad.
        var: String,
        /// NaN values in its gradient.
        nan: u64,
        /// Infinite values in its gradient.
        infinite: u64,
        /// Values in its gradient.
        elements: usize,
        /// NaN and infinite values in all gradients.
        total: u64,
        /// The norm that was to be taken.
        norm_type: NormType,
    },
    /// More steps in a row were skipped than [`Clip::max_skips`](crate::Clip::max_skips) allows.
    #[error(
        "gradients were not finite in {skips} step(s) in a row, more than max_skips = {max_skips}: \
         the first bad Var is {var}; the weights are as they were before the first of \
         them; lower the learning rate or look at the data"
    )]
    TooManySkips {
        /// Skipped steps in a row, this one included.
        skips: u32,
        /// How many are allowed.
        max_skips: u32,
        /// Name of the first Var whose gradient is bad.
        var: String,
    },
    /// A gradient of a dtype that cannot be clipped.
    #[error("the gradient of {var} is {dtype:?}, expected F32, F64, F16 or BF16")]
    UnsupportedDType {
        /// Name of the Var.
        var: String,
        /// Its gradient's dtype.
        dtype: DType,
    },
    /// A gradient whose shape, dtype or device is not its Var's.
    #[error("{var} has {property} {expected}, but its gradient has {property} {got}")]
    Mismatch {
        /// Name of the Var.
        var: String,
        /// "shape", "dtype" or "device".
        property: &'static str,
        /// The Var's.
        expected: String,
        /// The gradient's.
        got: String,
    },
    /// A pattern of a [`ParamGroup`](crate::optim::ParamGroup) that matches no Var.
    #[error(
        "pattern `{pattern}` of group `{group}` matches none of {vars} Var(s), whose names are such as \
         `{example}`; is it a typing error? (`*` stands for any characters, and the whole name must match; an \
         optimizer made of a Vec<Var> has no names)"
    )]
    UnmatchedPattern {
        /// The group's name.
        group: String,
        /// The pattern.
        pattern: String,
        /// How many Vars there are.
        vars: usize,
        /// The name of one of them.
        example: String,
    },
    /// Groups of a [`ClippedOptimizer`](crate::ClippedOptimizer) that its inner optimizer can't follow.
    #[error(
        "group `{group}` sets lr_scale or weight_decay, which the inner optimizer {optimizer} has but one of; make \
         it an optim::PerGroup of them, and give the wrapper groups.only_limits()"
    )]
    GroupsNeedFused {
        /// The first such group's name.
        group: String,
        /// The inner optimizer's type.
        optimizer: &'static str,
    },
    /// An error of candle, from `backward`, from the inner optimizer or from a device.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => Self::msg(other),
        }
    }
}
