//! The CUDA backend without a GPU: the emulated driver of `ci/cuda-on-host`, candle's operations on
//! it, and clipping compared with the CPU.

/// Launches a kernel with arguments.
macro_rules! launch {
    ($device:expr, $name:literal, $config:expr $(, $argument:expr)* $(,)?) => {{
        let function = $device.get_or_load_custom_func($name, "selftest", "")?;
        let function = function.into_cuda_function();
        let stream = $device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        $(builder.arg($argument);)*
        // SAFETY: the arguments match the kernel's in selftest.cu, and the buffers have the lengths
        // that it expects.
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

/// Asserts that each element differs by at most `tolerance` times the largest. NaN equals only NaN.
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
