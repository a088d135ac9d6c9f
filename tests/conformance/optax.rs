//! optax's `_clipping_test.py`.

use anyhow::Result;
use candle_core::Tensor;
use candle_grad_clip::{
    ClipGradNorm, NormType, clip_by_global_norm, clip_grad_norm, clip_grad_norm_with,
    clip_grad_value, total_norm,
};
use support::gradients::{bits_of_gradients, store_for, store_of};
use support::oracle::assert_all_close;

use super::{elements, on_every_backend, vector};

fn optax_updates() -> candle_core::Result<[Tensor; 2]> {
    Ok([vector(&[500.0, 5.0])?, vector(&[300.0, 3.0])?])
}

#[test]
fn global_norm_is_the_limit_over_50_rounds_and_clipping_again_changes_nothing() -> Result<()> {
    on_every_backend(|| {
        let (vars, mut repeated) = store_of(&optax_updates()?)?;
        for round in 1..=50 {
            let max_norm = 1.0 / f64::from(round);
            let mut single = store_for(&vars, &optax_updates()?);
            clip_grad_norm(&mut single, &vars, max_norm)?;
            clip_grad_norm(&mut repeated, &vars, max_norm)?;
            let norm = total_norm(&single, &vars, NormType::L2)?;
            assert!((norm - max_norm).abs() <= 5e-7, "{norm} in round {round}");
            let (single, repeated) = (elements(&single, &vars)?, elements(&repeated, &vars)?);
            // The eps of 1e-6 takes as much off in every round.
            assert_all_close(&repeated, &single, 1.1e-6, &format!("round {round}"));
        }
        Ok(())
    })
}

#[test]
fn clip_at_a_million_is_the_identity_and_at_one_gives_ones() -> Result<()> {
    on_every_backend(|| {
        let (vars, mut grads) = store_of(&optax_updates()?)?;
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
