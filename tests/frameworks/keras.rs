//! Keras' optimizer tests.

use std::f64::consts::FRAC_1_SQRT_2;

use anyhow::Result;
use candle_grad_clip::{ClipGradNorm, clip_by_global_norm, clip_grad_norm_with, clip_grad_value};
use support::gradients::{store_for, store_of, tensor};
use support::oracle::{assert_all_close, assert_close};

use super::{elements, in_wide_dtypes};

#[test]
fn clipnorm_clipvalue_and_global_clipnorm() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        let vector = |values: &[f64]| tensor(values, values.len(), dtype);
        let (vars, mut grads) = store_of(&[vector(&[100.0, 100.0])?])?;
        let by_norm = ClipGradNorm {
            eps: 0.0, // Keras has none
            ..ClipGradNorm::default()
        };
        clip_grad_norm_with(&mut grads, &vars, &by_norm)?;
        let clipped = elements(&grads, &vars)?;
        assert_all_close(&clipped, &[FRAC_1_SQRT_2; 2], tolerance, "clipnorm");
        let mut grads = store_for(&vars, &[vector(&[100.0, 100.0])?]);
        clip_grad_value(&mut grads, &vars, 1.0)?;
        assert_eq!(elements(&grads, &vars)?, [1.0, 1.0], "clipvalue");
        // Keras' has one tensor; of two the norm is the same.
        for gradients in [
            vec![vector(&[50.0, 100.0])?],
            vec![vector(&[50.0])?, vector(&[100.0])?],
        ] {
            let (vars, grads) = store_of(&gradients)?;
            let (clipped, norm) = clip_by_global_norm(&grads, &vars, 1.0, None)?;
            let right = 12_500f64.sqrt();
            assert_close(norm, right, tolerance, "norm");
            let clipped = elements(&clipped, &vars)?;
            let expected = [50.0 / right, 100.0 / right];
            assert_all_close(&clipped, &expected, tolerance, "global_clipnorm");
        }
        Ok(())
    })
}
