//! TensorFlow's `clip_ops_test.py`.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::{
    Error, NonFinite, NormType, clip_by_global_norm, clip_grad_norm, clip_grad_norm_with,
    clip_grad_value,
};
use support::device::{device, on_every_backend};
use support::gradients::{FLOATS, bits_of_gradients, gradients_of, store_of, tensor, values};
use support::oracle::{assert_all_close, assert_close};

use super::{elements, in_wide_dtypes, options};

#[test]
fn v1_values_are_clipped_in_every_dtype() -> Result<()> {
    on_every_backend(|| {
        for dtype in FLOATS {
            let matrix = tensor(&[-5.0, 2.0, 3.0, 4.0, 5.0, 6.0], (2, 3), dtype)?;
            let (vars, mut grads) = store_of(&[matrix])?;
            clip_grad_value(&mut grads, &vars, 4.4)?;
            let bound = values(&tensor(&[4.4], 1, dtype)?)?[0];
            let expected = [-bound, 2.0, 3.0, 4.0, bound, bound];
            assert_eq!(elements(&grads, &vars)?, expected, "{dtype:?}");
        }
        Ok(())
    })
}

#[test]
fn v4_infinite_values_become_the_bound_and_nan_stays() -> Result<()> {
    on_every_backend(|| {
        for dtype in FLOATS {
            let gradient = tensor(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY], 3, dtype)?;
            let (vars, mut grads) = store_of(&[gradient])?;
            clip_grad_value(&mut grads, &vars, 4.0)?;
            let after = elements(&grads, &vars)?;
            assert!(after[0].is_nan(), "{dtype:?}: {after:?}");
            assert_eq!(after[1..], [4.0, -4.0], "{dtype:?}");
        }
        Ok(())
    })
}

/// PyTorch raises for the infinity norm of a gradient without elements.
#[test]
fn v5_gradients_without_elements_are_fine() -> Result<()> {
    on_every_backend(|| {
        for dtype in FLOATS {
            for shape in [vec![0], vec![7, 0], vec![0, 7], vec![3, 0, 2]] {
                let empty = || Tensor::zeros(shape.as_slice(), dtype, device());
                let full = tensor(&[3.0, 4.0], 2, dtype)?;
                let (vars, mut grads) = store_of(&[empty()?, full, empty()?])?;
                clip_grad_value(&mut grads, &vars, 3.0)?;
                assert_eq!(elements(&grads, &vars)?, [3.0, 3.0], "{dtype:?} {shape:?}");
                let by_max = options(1.0, NormType::Inf, NonFinite::Error);
                let norm = clip_grad_norm_with(&mut grads, &vars, &by_max)?;
                assert_close(norm, 3.0, 1e-7, "infinity norm");
                let (clipped, _) = clip_by_global_norm(&grads, &vars, 0.5, None)?;
                for (var, grad) in vars.iter().zip(gradients_of(&clipped, &vars)?) {
                    assert_eq!(grad.dims(), var.dims());
                }
            }
        }
        Ok(())
    })
}

#[test]
fn n1_clip_by_norm_of_one_matrix() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        let clipped = |matrix: [f64; 6], clip_norm: f64| -> Result<(Vec<f64>, f64)> {
            let (vars, grads) = store_of(&[tensor(&matrix, (2, 3), dtype)?])?;
            let (clipped, norm) = clip_by_global_norm(&grads, &vars, clip_norm, None)?;
            assert_eq!(elements(&grads, &vars)?, matrix, "the input");
            Ok((elements(&clipped, &vars)?, norm))
        };
        let matrix = [-3.0, 0.0, 0.0, 4.0, 0.0, 0.0];
        let (after, norm) = clipped(matrix, 4.0)?;
        assert_close(norm, 5.0, tolerance, "norm");
        assert_all_close(&after, &[-2.4, 0.0, 0.0, 3.2, 0.0, 0.0], tolerance, "at 4");
        assert_eq!(clipped(matrix, 6.0)?.0, matrix);
        assert_eq!(clipped([0.0; 6], 4.0)?, (vec![0.0; 6], 0.0));
        Ok(())
    })
}

/// TensorFlow's axes: the columns, then the rows of [[-3, 0, 0], [4, 0, 3]], a call for each.
#[test]
fn n2_clip_by_norm_of_columns_and_rows() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        let cases: [(&[f64], &[f64]); 5] = [
            (&[-3.0, 4.0], &[-2.4, 3.2]),
            (&[0.0, 0.0], &[0.0, 0.0]),
            (&[0.0, 3.0], &[0.0, 3.0]),
            (&[-3.0, 0.0, 0.0], &[-3.0, 0.0, 0.0]),
            (&[4.0, 0.0, 3.0], &[3.2, 0.0, 2.4]),
        ];
        for (before, after) in cases {
            let (vars, grads) = store_of(&[tensor(before, before.len(), dtype)?])?;
            let (clipped, _) = clip_by_global_norm(&grads, &vars, 4.0, None)?;
            assert_all_close(&elements(&clipped, &vars)?, after, tolerance, "at 4");
            let (clipped, _) = clip_by_global_norm(&grads, &vars, 6.0, None)?;
            assert_eq!(elements(&clipped, &vars)?, before, "at 6");
        }
        Ok(())
    })
}

#[test]
fn n3_the_example_of_the_documentation() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        let (vars, grads) = store_of(&[tensor(&[1.0, 2.0, 3.0, 4.0, 5.0], 5, dtype)?])?;
        let (clipped, _) = clip_by_global_norm(&grads, &vars, 2.0, None)?;
        let expected = [0.26968, 0.53936, 0.80904, 1.07872, 1.34840];
        assert_all_close(
            &elements(&clipped, &vars)?,
            &expected,
            tolerance + 5e-6,
            "at 2",
        );
        Ok(())
    })
}

/// The matrix and the vector of TensorFlow's tests of `clip_by_global_norm`.
fn g1_gradients(dtype: DType) -> candle_core::Result<[Tensor; 2]> {
    let matrix = tensor(&[-2.0, 0.0, 0.0, 4.0, 0.0, 0.0], (2, 3), dtype)?;
    Ok([matrix, tensor(&[1.0, -2.0], 2, dtype)?])
}

#[test]
fn g1_clip_by_global_norm_with_and_without_missing_gradients() -> Result<()> {
    on_every_backend(|| {
        for dtype in [DType::F32, DType::F64] {
            let (mut vars, grads) = store_of(&g1_gradients(dtype)?)?;
            for _ in 0..2 {
                let (clipped, norm) = clip_by_global_norm(&grads, &vars, 4.0, None)?;
                assert_close(norm, 5.0, 1e-7, "norm");
                let expected = [-1.6, 0.0, 0.0, 3.2, 0.0, 0.0, 0.8, -1.6];
                let with_gradients = [&vars[0], &vars[vars.len() - 1]].map(Clone::clone);
                assert_all_close(
                    &elements(&clipped, &with_gradients)?,
                    &expected,
                    1e-7,
                    "at 4",
                );
                let (clipped, norm) = clip_by_global_norm(&grads, &vars, 6.0, None)?;
                assert_close(norm, 5.0, 1e-7, "norm");
                let before = elements(&grads, &with_gradients)?;
                assert_eq!(elements(&clipped, &with_gradients)?, before, "at 6");
                let with_norm = clip_by_global_norm(&grads, &vars, 4.0, Some(5.0))?.0;
                assert_all_close(
                    &elements(&with_norm, &with_gradients)?,
                    &expected,
                    1e-7,
                    "5",
                );
                // Once more, with a Var that has no gradient between the two.
                vars.insert(1, Var::zeros(3, dtype, device())?);
            }
        }
        Ok(())
    })
}

#[test]
fn g1_zeros_have_a_norm_of_zero_and_stay() -> Result<()> {
    in_wide_dtypes(|dtype, _| {
        let matrix = tensor(&[0.0; 6], (2, 3), dtype)?;
        let (vars, grads) = store_of(&[matrix, tensor(&[0.0; 2], 2, dtype)?])?;
        let (clipped, norm) = clip_by_global_norm(&grads, &vars, 6.0, None)?;
        assert_eq!((elements(&clipped, &vars)?, norm), (vec![0.0; 8], 0.0));
        Ok(())
    })
}

#[test]
fn g1_one_infinite_element_makes_all_nan_or_is_an_error() -> Result<()> {
    on_every_backend(|| {
        let [matrix, _] = g1_gradients(DType::F32)?;
        let bad = tensor(&[f64::INFINITY, -2.0], 2, DType::F32)?;
        let (vars, mut grads) = store_of(&[matrix, bad])?;
        let before = bits_of_gradients(&grads, &vars)?;
        let (clipped, norm) = clip_by_global_norm(&grads, &vars, 4.0, None)?;
        assert!(norm.is_infinite() && norm > 0.0, "{norm}");
        assert!(elements(&clipped, &vars)?.iter().all(|x| x.is_nan()));
        let result = clip_grad_norm(&mut grads, &vars, 4.0);
        assert!(
            matches!(&result, Err(Error::NonFinite { var, infinite: 1, .. }) if var == "var.1"),
            "{result:?}"
        );
        assert_eq!(bits_of_gradients(&grads, &vars)?, before);
        Ok(())
    })
}
