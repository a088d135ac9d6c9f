//! optax's `_clipping_test.py`.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_grad_clip::{
    ClipGradNorm, NormType, clip_by_global_norm, clip_grad_norm_with, clip_grad_value, total_norm,
};
use support::device::on_every_backend;
use support::gradients::{bits_of_gradients, store_for, store_of, tensor};
use support::oracle::{assert_all_close, assert_close};

use super::{elements, in_wide_dtypes, vector};

fn optax_updates(dtype: DType) -> candle_core::Result<[Tensor; 2]> {
    Ok([
        tensor(&[500.0, 5.0], 2, dtype)?,
        tensor(&[300.0, 3.0], 2, dtype)?,
    ])
}

/// optax has no eps. Ours takes `eps / norm` off each value, where `norm` is that before the clip:
/// in round 50 it is 1 / 49, so with 1e-6 the values are off by 49e-6 of their own size.
#[test]
fn global_norm_is_the_limit_over_50_rounds_and_clipping_again_changes_nothing() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        for eps in [0.0, 1e-6] {
            let (vars, mut repeated) = store_of(&optax_updates(dtype)?)?;
            let mut taken_off: f64 = 0.0;
            for round in 1..=50 {
                let what = format!("eps {eps}, round {round}");
                let max_norm = 1.0 / f64::from(round);
                let clip = ClipGradNorm {
                    max_norm,
                    eps,
                    ..ClipGradNorm::default()
                };
                let mut single = store_for(&vars, &optax_updates(dtype)?);
                clip_grad_norm_with(&mut single, &vars, &clip)?;
                let before = total_norm(&repeated, &vars, NormType::L2)?;
                clip_grad_norm_with(&mut repeated, &vars, &clip)?;
                taken_off = eps / before;
                let norm = total_norm(&single, &vars, NormType::L2)?;
                // optax' own tolerance, in places after the point, and a relative one.
                assert!(
                    (norm - max_norm).abs() <= 5e-7 + tolerance,
                    "{what}: {norm}"
                );
                assert_close(norm, max_norm, tolerance + eps / 500.0, &what);
                let (single, repeated) = (elements(&single, &vars)?, elements(&repeated, &vars)?);
                assert_all_close(&repeated, &single, tolerance + taken_off, &what);
            }
            assert!(taken_off <= 49.1e-6, "{taken_off:e}");
        }
        Ok(())
    })
}

#[test]
fn clip_at_a_million_is_the_identity_and_at_one_gives_ones() -> Result<()> {
    in_wide_dtypes(|dtype, _| {
        let (vars, mut grads) = store_of(&optax_updates(dtype)?)?;
        let before = bits_of_gradients(&grads, &vars)?;
        clip_grad_value(&mut grads, &vars, 1e6)?;
        assert_eq!(bits_of_gradients(&grads, &vars)?, before);
        clip_grad_value(&mut grads, &vars, 1.0)?;
        assert_eq!(elements(&grads, &vars)?, [1.0; 4]);
        Ok(())
    })
}

/// NaN in optax 0.2.8 (its issue 1752) and in TensorFlow 2.21.
#[test]
fn a_limit_of_zero_gives_zeros_also_for_zeros() -> Result<()> {
    on_every_backend(|| {
        for values in [[0.0, 0.0], [3.0, -4.0]] {
            for eps in [0.0, 1e-6] {
                let (vars, mut grads) = store_of(&[vector(&values)?])?;
                let to_zero = ClipGradNorm {
                    max_norm: 0.0,
                    eps,
                    ..ClipGradNorm::default()
                };
                let (copy, _) = clip_by_global_norm(&grads, &vars, 0.0, None)?;
                clip_grad_norm_with(&mut grads, &vars, &to_zero)?;
                assert_eq!(elements(&grads, &vars)?, [0.0, 0.0]);
                assert_eq!(elements(&copy, &vars)?, [0.0, 0.0]);
            }
        }
        Ok(())
    })
}
