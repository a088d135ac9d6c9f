//! The norm against a compensated f64 sum, over the whole range of every dtype.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_grad_clip::{
    ClipGradNorm, NormType, clip_grad_norm, clip_grad_norm_with, clip_grads_with_norm, total_norm,
};
use half::{bf16, f16};
use support::device::device;
use support::gradients::{
    all_values, gradients_of, random_values, store_of, tensor, values, wide_values,
};
use support::oracle::{self, assert_close};

/// Orders for which 1e-12 is promised.
const ORDERS: [f64; 7] = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, f64::INFINITY];

/// Magnitudes that squares of the dtype, or sums of them, can't hold.
fn magnitudes(dtype: DType) -> Vec<f64> {
    let (smallest, normal, max) = match dtype {
        DType::F64 => (5e-324, f64::MIN_POSITIVE, f64::MAX),
        DType::F32 => (1e-45, f32::MIN_POSITIVE.into(), f32::MAX.into()),
        DType::F16 => (
            f16::MIN_POSITIVE_SUBNORMAL.into(),
            f16::MIN_POSITIVE.into(),
            f16::MAX.into(),
        ),
        _ => (
            bf16::MIN_POSITIVE_SUBNORMAL.into(),
            bf16::MIN_POSITIVE.into(),
            bf16::MAX.into(),
        ),
    };
    let inside = [
        1e-200, 1e-160, 1e-25, 1e-10, 1.0, 300.0, 60000.0, 1e25, 1e200,
    ];
    let fits = |x: &f64| (smallest..=max).contains(x);
    let mut all: Vec<f64> = inside.into_iter().filter(fits).collect();
    all.extend([smallest, normal, max]);
    all
}

/// Asserts that every norm of the gradients is right to 1e-12.
fn check(gradients: &[Tensor], what: &str) -> Result<()> {
    let (vars, store) = store_of(gradients)?;
    let elements = all_values(gradients)?;
    for p in ORDERS {
        let right = oracle::norm(&elements, p);
        let ours = total_norm(&store, &vars, NormType::from(p))?;
        if right.is_finite() {
            assert_close(ours, right, 1e-12, &format!("{what}, {p}-norm"));
        } else {
            assert!(
                ours.is_infinite(),
                "{what}, {p}-norm passes f64's maximum: {ours:e}"
            );
        }
    }
    Ok(())
}

#[test]
fn special_magnitudes_of_every_dtype() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for magnitude in magnitudes(dtype) {
            for n in [1, 2, 7, 16, 33, 1000] {
                let what = format!("{n} of {magnitude:e} in {dtype:?}");
                check(&[tensor(&vec![-magnitude; n], n, dtype)?], &what)?;
            }
        }
    }
    Ok(())
}

#[test]
fn mixed_magnitudes_in_one_tensor_and_in_many() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let mut mixed = magnitudes(dtype);
        mixed.extend([0.0, -0.0, 1.0, -2.0]);
        check(
            &[tensor(&mixed, mixed.len(), dtype)?],
            &format!("{dtype:?} in one"),
        )?;
        let one_each: Vec<Tensor> = mixed
            .iter()
            .map(|x| tensor(&[*x], (), dtype))
            .collect::<candle_core::Result<_>>()?;
        check(&one_each, &format!("{dtype:?}, one each"))?;
    }
    Ok(())
}

#[test]
fn lengths_around_lanes_chunks_and_blocks() -> Result<()> {
    let lengths = (0..70).chain([
        1023, 1025, 16_383, 16_384, 16_385, 65_535, 65_536, 65_537, 131_073,
    ]);
    for n in lengths {
        for dtype in [DType::F32, DType::F64] {
            let what = format!("{n} in {dtype:?}");
            check(&[tensor(&wide_values(n, n as u64), n, dtype)?], &what)?;
        }
        for dtype in [DType::F16, DType::BF16] {
            let what = format!("{n} in {dtype:?}");
            check(&[tensor(&random_values(n, n as u64), n, dtype)?], &what)?;
        }
    }
    Ok(())
}

#[test]
fn a_norm_past_f64s_maximum_is_infinite_and_still_clipped() -> Result<()> {
    let (vars, mut store) = store_of(&[tensor(&[f64::MAX; 9], 9, DType::F64)?])?;
    assert_eq!(total_norm(&store, &vars, NormType::L2)?, f64::INFINITY);
    assert_eq!(
        clip_grad_norm(&mut store, &vars, 6.0)?,
        f64::INFINITY,
        "no error: all are finite"
    );
    for x in all_values(&gradients_of(&store, &vars)?)? {
        assert_close(x, 2.0, 1e-12, "6 = sqrt(9 * 2^2)");
    }
    Ok(())
}

#[test]
fn a_root_past_f64s_maximum_is_infinite_and_still_clipped() -> Result<()> {
    let n = 100_000;
    let clip = |element: f64, p: f64| -> Result<Vec<f64>> {
        let (vars, mut store) = store_of(&[tensor(&vec![element; n], n, DType::F64)?])?;
        let options = ClipGradNorm {
            norm_type: NormType::P(p),
            max_norm: 1e40,
            ..ClipGradNorm::default()
        };
        let norm = clip_grad_norm_with(&mut store, &vars, &options)?;
        assert_eq!(norm, f64::INFINITY, "no error: all elements are finite");
        Ok(all_values(&gradients_of(&store, &vars)?)?)
    };
    for x in clip(1e280, 0.1)? {
        assert_close(x, 1e-10, 1e-9, "1e280 * 1e40 / (1e280 * 1e5^10)");
    }
    // 1e5^100 is 1e500, and 1e40 / 1e500 is zero to any f64.
    assert!(clip(1.0, 0.01)?.iter().all(|x| *x == 0.0));
    Ok(())
}

#[test]
fn a_hundred_thousand_bf16_ones() -> Result<()> {
    let (vars, store) = store_of(&[Tensor::ones(100_000, DType::BF16, device())?])?;
    let norm = total_norm(&store, &vars, NormType::L2)?;
    assert_close(
        norm,
        1e5f64.sqrt(),
        1e-15,
        "candle's own sum of them is 256",
    );
    assert_eq!(format!("{norm:.4}"), "316.2278");
    Ok(())
}

#[test]
fn a_tiny_coefficient_does_not_vanish_in_half_precision() -> Result<()> {
    let (vars, mut store) = store_of(&[tensor(&[60000.0], 1, DType::F16)?])?;
    clip_grads_with_norm(&mut store, &vars, 1e-8, 1.0)?;
    let clipped = values(&gradients_of(&store, &vars)?[0])?[0];
    assert_close(clipped, 6e-4, 1e-3, "f16: candle's product is 0");

    // Below f32's range as well: 3e38 * 1e-40 is 0.03.
    let (vars, mut store) = store_of(&[tensor(&[3e38], 1, DType::BF16)?])?;
    clip_grads_with_norm(&mut store, &vars, 1e-40, 1.0)?;
    let clipped = values(&gradients_of(&store, &vars)?[0])?[0];
    assert_close(clipped, 0.03, 1e-2, "bf16");
    Ok(())
}

#[test]
fn sixteen_million_values() -> Result<()> {
    let n = 16 << 20;
    let mut rng = fastrand::Rng::with_seed(1);
    let elements: Vec<f32> = (0..n).map(|_| rng.f32() - 0.5).collect();
    let wide: Vec<f64> = elements.iter().map(|x| f64::from(*x)).collect();
    let gradient = Tensor::from_vec(elements, n, device())?;
    let (vars, store) = store_of(&[gradient])?;
    for p in [1.0, 2.0, f64::INFINITY] {
        let ours = total_norm(&store, &vars, NormType::from(p))?;
        assert_close(ours, oracle::norm(&wide, p), 1e-12, &format!("{p}-norm"));
    }
    Ok(())
}

#[test]
#[should_panic(expected = "element 1 is")]
fn small_values_are_compared_relatively() {
    let (ours, right) = ([1.0, 1.000_01e-3], [1.0, 1e-3]);
    oracle::assert_all_close(&ours, &right, 1e-6, "1e-5 of the value");
}

#[test]
fn the_floor_of_a_dtype_is_its_smallest_number() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let floor = oracle::floor(dtype);
        let [half, held] = [floor / 4.0, floor].map(|x| tensor(&[x], 1, dtype));
        assert_eq!(values(&half?)?, [0.0], "{dtype:?}");
        let held = values(&held?)?[0];
        assert!(held > 0.0 && held <= floor, "{dtype:?}: {held:e}");
        oracle::assert_all_close_above(&[held], &[0.0], 0.0, floor, "a rounding near 0");
    }
    Ok(())
}
