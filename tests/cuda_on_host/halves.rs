//! Half precision on the stand-in: every conversion to the bit.

use anyhow::Result;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use half::{bf16, f16};
use support::cuda_on_host::Driver;

use super::driver::{device, launch, uninitialized};

/// The bits of a value, of its midpoint to the next, and of what lies just beside that, as f64.
fn rounded(to_f64: impl Fn(u16) -> f64) -> Vec<(f64, u16)> {
    let mut cases = vec![(f64::NAN, 0x7fff)]; // CUDA has one NaN
    for sign in [0, 0x8000] {
        for bits in (sign..sign + 0x7fff).take_while(|bits| to_f64(*bits).is_finite()) {
            let (value, next) = (to_f64(bits), to_f64(bits + 1));
            // Infinity begins half a step after the largest value, as if the exponent went on.
            let next = if next.is_infinite() {
                value + (value - to_f64(bits - 1))
            } else {
                next
            };
            let middle = f64::midpoint(value, next);
            let (inward, outward) = if sign == 0 {
                (middle.next_down(), middle.next_up())
            } else {
                (middle.next_up(), middle.next_down())
            };
            cases.extend([
                (value, bits),
                (middle, bits + bits % 2),
                (inward, bits),
                (outward, bits + 1),
            ]);
        }
    }
    cases
}

/// What the device made of some numbers, in f16 and in bf16.
struct Converted {
    /// Of f64 numbers.
    from_f64: (Vec<f16>, Vec<bf16>),
    /// Of the same, as f32.
    from_f32: (Vec<f16>, Vec<bf16>),
    /// Of all bits of a half.
    widened: (Vec<f32>, Vec<f32>),
}

fn converted(inputs: &[f64]) -> Result<Converted> {
    let _driver = Driver::lock();
    let device = device()?;
    let n = inputs.len();
    let count = n as u32;
    let input = device.clone_htod(inputs)?;
    let halves = || uninitialized::<f16>(&device, n);
    let brains = || uninitialized::<bf16>(&device, n);
    let floats = || uninitialized::<f32>(&device, n);
    let mut from_f64 = (halves()?, brains()?);
    let mut from_f32 = (halves()?, brains()?);
    let mut widened = (floats()?, floats()?);
    launch!(
        device,
        "selftest_round",
        launch(3, 256),
        &input,
        &count,
        &mut from_f64.0,
        &mut from_f64.1,
        &mut from_f32.0,
        &mut from_f32.1,
        &mut widened.0,
        &mut widened.1,
    )?;
    Ok(Converted {
        from_f64: (
            device.clone_dtoh(&from_f64.0)?,
            device.clone_dtoh(&from_f64.1)?,
        ),
        from_f32: (
            device.clone_dtoh(&from_f32.0)?,
            device.clone_dtoh(&from_f32.1)?,
        ),
        widened: (
            device.clone_dtoh(&widened.0)?,
            device.clone_dtoh(&widened.1)?,
        ),
    })
}

#[test]
fn half_precision_rounds_to_the_bit() -> Result<()> {
    let cases = (
        rounded(|bits| f16::from_bits(bits).to_f64()),
        rounded(|bits| bf16::from_bits(bits).to_f64()),
    );
    let inputs: Vec<f64> = cases.0.iter().chain(&cases.1).map(|case| case.0).collect();
    let got = converted(&inputs)?;
    for (i, (x, bits)) in cases.0.iter().enumerate() {
        assert_eq!(got.from_f64.0[i].to_bits(), *bits, "{x:e} to f16");
    }
    for (i, (x, bits)) in (cases.0.len()..).zip(&cases.1) {
        assert_eq!(got.from_f64.1[i].to_bits(), *bits, "{x:e} to bf16");
    }
    let as_f32 = inputs.iter().map(|x| *x as f32).enumerate();
    for (i, x) in as_f32.filter(|(_, x)| !x.is_nan()) {
        let right = (f16::from_f32(x).to_bits(), bf16::from_f32(x).to_bits());
        assert_eq!(got.from_f32.0[i].to_bits(), right.0, "{x:e} to f16");
        assert_eq!(got.from_f32.1[i].to_bits(), right.1, "{x:e} to bf16");
    }
    let same = |got: f32, right: f32| got == right || (got.is_nan() && right.is_nan());
    for bits in 0..=u16::MAX {
        let at = usize::from(bits);
        let half = f16::from_bits(bits).to_f32();
        let brain = bf16::from_bits(bits).to_f32();
        assert!(same(got.widened.0[at], half), "{bits:x}");
        assert!(same(got.widened.1[at], brain), "{bits:x}");
    }
    Ok(())
}
