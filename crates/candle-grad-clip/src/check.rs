//! Range checks of options.

use candle_grad_clip_kernels::NormType;

use crate::error::{Error, Result};

/// A limit of a [`Clip`](crate::Clip). 0 is refused: users who write it mean "off", but it would
/// freeze the model.
pub(crate) fn check_limit(name: &'static str, value: f64) -> Result<()> {
    if value > 0.0 {
        return Ok(());
    }
    let expected = if value == 0.0 {
        "a value above 0: 0 would set every gradient to 0; Clip::none() turns clipping off"
    } else {
        "a value above 0"
    };
    Err(Error::InvalidOption {
        name,
        value,
        expected,
    })
}

/// A limit of a free function; 0 is allowed.
pub(crate) fn check_bound(name: &'static str, value: f64) -> Result<()> {
    if value >= 0.0 {
        Ok(())
    } else {
        Err(Error::InvalidOption {
            name,
            value,
            expected: "0 or above",
        })
    }
}

/// A hyper-parameter that must be finite, and 0 or above.
pub(crate) fn check_not_negative(name: &'static str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::InvalidOption {
        name,
        value,
        expected: "0 or a finite value above",
    })
}

/// A decay rate, in `[0, 1)`.
pub(crate) fn check_decay(name: &'static str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::InvalidOption {
        name,
        value,
        expected: "0 or above, and below 1",
    })
}

/// The norm type, if it is valid.
pub(crate) fn check_norm_type(norm_type: NormType) -> Result<NormType> {
    if norm_type.is_valid() {
        Ok(norm_type)
    } else {
        Err(Error::InvalidNormType { p: norm_type.p() })
    }
}
