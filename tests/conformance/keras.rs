//! Keras' optimizer tests.

use std::f64::consts::FRAC_1_SQRT_2;

use anyhow::Result;
use candle_grad_clip::{clip_by_global_norm, clip_grad_norm, clip_grad_value};
use support::gradients::{store_for, store_of};
use support::oracle::{assert_all_close, assert_close};

use super::{EXACT, elements, on_every_backend, vector};

#[test]
fn clipnorm_clipvalue_and_global_clipnorm() -> Result<()> {
    on_every_backend(|| {
        let (vars, mut grads) = store_of(&[vector(&[100.0, 100.0])?])?;
        clip_grad_norm(&mut grads, &vars, 1.0)?;
        assert_all_close(
            &elements(&grads, &vars)?,
            &[FRAC_1_SQRT_2; 2],
            1e-6,
            "clipnorm",
        );
        let mut grads = store_for(&vars, &[vector(&[100.0, 100.0])?]);
        clip_grad_value(&mut grads, &vars, 1.0)?;
        assert_eq!(elements(&grads, &vars)?, [1.0, 1.0], "clipvalue");
        let (vars, grads) = store_of(&[vector(&[50.0])?, vector(&[100.0])?])?;
        let (clipped, norm) = clip_by_global_norm(&grads, &vars, 1.0, None)?;
        let expected = [50.0 / norm, 100.0 / norm];
        assert_close(norm, 12_500f64.sqrt(), EXACT, "norm");
        assert_all_close(
            &elements(&clipped, &vars)?,
            &expected,
            EXACT,
            "global_clipnorm",
        );
        Ok(())
    })
}
