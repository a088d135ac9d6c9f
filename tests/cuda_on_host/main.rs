//! CUDA without a GPU: the stand-in driver of `ci/cuda-on-host` itself, candle's operations on it,
//! and clipping of gradients that live there, compared with the same on CPU.

/// Launches a kernel with arguments.
macro_rules! launch {
    ($device:expr, $name:literal, $config:expr $(, $argument:expr)* $(,)?) => {{
        let function = $device.get_or_load_custom_func($name, "selftest", "")?;
        let function = function.into_cuda_function();
        let stream = $device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        $(builder.arg($argument);)*
        // SAFETY: the arguments are those of the kernel in selftest.cu, the buffers as long as it
        // says.
        unsafe { builder.launch($config) }.map(|_| ())
    }};
}

mod candle;
mod clipping;
mod driver;
mod halves;
mod interruptions;
mod placements;
mod steps;

use anyhow::{Result, ensure};
use candle_core::Tensor;
use support::gradients::values;

/// That each element differs by at most `tolerance` of the largest; NaN only equals NaN.
fn assert_close(got: &Tensor, want: &Tensor, tolerance: f64, what: &str) -> Result<()> {
    let (got, want) = (values(got)?, values(want)?);
    ensure!(got.len() == want.len(), "{what}: other shapes");
    let largest = want
        .iter()
        .filter(|x| x.is_finite())
        .fold(0f64, |a, x| a.max(x.abs()));
    for (i, (got, want)) in got.into_iter().zip(want).enumerate() {
        let same = got == want || (got.is_nan() && want.is_nan());
        ensure!(
            same || (got - want).abs() <= tolerance * largest,
            "{what}, element {i}: {got:e} for {want:e}"
        );
    }
    Ok(())
}
