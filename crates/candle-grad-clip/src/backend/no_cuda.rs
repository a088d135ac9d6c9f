//! A stub for `cuda` without that feature. It is never called: candle has no CUDA devices then.

use candle_core::{Device, Tensor};
use candle_grad_clip_kernels::Edit;

use super::device_steps::{Counted, DeviceSteps, UpdateJob};
use crate::error::{Error, Result};
use crate::gradients::{Entry, GradStats, Request};
use crate::param_state::StepRule;

fn not_built() -> Error {
    candle_core::Error::NotCompiledWithCudaSupport.into()
}

#[allow(clippy::unnecessary_wraps)] // called in each step, with nothing to do
pub(crate) fn measure(_: &mut [Entry<'_>], _: Request) -> Result<GradStats> {
    Ok(GradStats::ZERO)
}

pub(crate) fn edit(_: &[(&Tensor, &Tensor, Edit)]) -> Result<()> {
    Err(not_built())
}

pub(crate) fn update(_: &[UpdateJob<'_>], _: &[StepRule]) -> Result<()> {
    Err(not_built())
}

pub(crate) fn start_steps(_: &Device, _: &Counted) -> Result<Box<dyn DeviceSteps>> {
    Err(not_built())
}
