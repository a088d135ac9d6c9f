//! CUDA without a GPU: the stand-in driver of `ci/cuda-on-host` itself, candle's operations on it, and
//! clipping of gradients that live there, compared with the same on CPU.

mod candle;
mod clipping;
mod driver;
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
