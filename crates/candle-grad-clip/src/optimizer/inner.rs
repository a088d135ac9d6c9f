//! The inner optimizer, as the step uses it.

use candle_core::backprop::GradStore;
use candle_nn::Optimizer;

use crate::check::check_not_negative;
use crate::error::Result;
use crate::optim::{self, FusedParts};

/// Fused optimizers of this crate, whose update applies the clip, or any other optimizer.
pub(crate) enum Inner<'o> {
    Fused(FusedParts<'o>),
    Foreign(&'o mut dyn Foreign),
}

/// The methods that a step needs of any other optimizer.
pub(crate) trait Foreign {
    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()>;
    fn learning_rate(&self) -> f64;
}

impl<O: Optimizer> Foreign for O {
    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        Optimizer::step(self, grads)
    }

    fn learning_rate(&self) -> f64 {
        Optimizer::learning_rate(self)
    }
}

impl<'o> Inner<'o> {
    pub(crate) fn of<O: Optimizer + 'static>(inner: &'o mut O) -> Self {
        // Two calls, since the borrow checker rejects a borrow that one branch returns and the
        // other ends.
        if optim::fused(inner).is_none() {
            return Self::Foreign(inner);
        }
        match optim::fused(inner) {
            Some(fused) => Self::Fused(fused),
            None => unreachable!("it was one of ours a line before"),
        }
    }

    pub(crate) fn is_fused(&self) -> bool {
        matches!(self, Self::Fused(_))
    }

    /// Returns an error for a learning rate that would ruin the weights. The fused optimizers check
    /// theirs.
    pub(crate) fn check_learning_rate(&self) -> Result<()> {
        match self {
            Self::Fused(_) => Ok(()),
            Self::Foreign(inner) => {
                check_not_negative("the inner optimizer's learning rate", inner.learning_rate())
            }
        }
    }
}
