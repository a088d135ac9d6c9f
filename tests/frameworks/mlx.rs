//! MLX's tests of `clip_grad_norm` and of its sharded norm.

use anyhow::Result;
use candle_grad_clip::{Error, NormType, clip_grad_norm, clip_grads_with_norm, total_norm};
use support::gradients::{bits_of_gradients, store_for, store_of, tensor};
use support::oracle::{assert_all_close, assert_close};

use super::{elements, in_wide_dtypes};

#[test]
fn three_tensors_below_and_above_the_limit() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        let vector = |values: &[f64]| tensor(values, values.len(), dtype);
        let small = [vector(&[0.1, 0.2])?, vector(&[0.1])?, vector(&[0.3])?];
        let (vars, mut grads) = store_of(&small)?;
        let before = bits_of_gradients(&grads, &vars)?;
        assert_close(
            clip_grad_norm(&mut grads, &vars, 10.0)?,
            0.387_298_3,
            tolerance + 1e-7,
            "norm",
        );
        assert_eq!(bits_of_gradients(&grads, &vars)?, before);
        let large = [vector(&[10.0, 20.0])?, vector(&[10.0])?, vector(&[30.0])?];
        let mut grads = store_for(&vars, &large);
        clip_grad_norm(&mut grads, &vars, 1.0)?;
        assert_close(
            total_norm(&grads, &vars, NormType::L2)?,
            1.0,
            tolerance + 1e-6,
            "norm after",
        );
        let expected = [10.0, 20.0, 10.0, 30.0].map(|x| x * 0.025_819_9);
        assert_all_close(
            &elements(&grads, &vars)?,
            &expected,
            tolerance + 1e-6,
            "gradients",
        );
        let before = bits_of_gradients(&grads, &vars)?;
        let result = clip_grad_norm(&mut grads, &vars, -1.0);
        let is_named = matches!(
            result,
            Err(Error::InvalidOption {
                name: "max_norm",
                ..
            })
        );
        assert!(is_named, "{result:?}");
        assert_eq!(bits_of_gradients(&grads, &vars)?, before);
        Ok(())
    })
}

/// The norm over N processes from the norms of each, and clipping each by it.
#[test]
fn shards_are_clipped_by_the_norm_of_all() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        let vector = |values: &[f64]| tensor(values, values.len(), dtype);
        for world_size in [1, 2, 4, 8] {
            let mut shards = Vec::new();
            for _ in 0..world_size {
                let matrix = tensor(&[3.0; 12], (3, 4), dtype)?;
                shards.push(store_of(&[matrix, vector(&[3.0; 5])?])?);
            }
            let mut power = 0.0;
            for (vars, grads) in &shards {
                power += total_norm(grads, vars, NormType::L2)?.powi(2);
            }
            let norm = power.sqrt();
            let right = 3.0 * (17.0 * f64::from(world_size)).sqrt();
            assert_close(norm, right, tolerance, "norm of all shards");
            for (vars, grads) in &mut shards {
                clip_grads_with_norm(grads, vars, 1.0, norm)?;
                let expected = [3.0 / (right + 1e-6); 17];
                assert_all_close(&elements(grads, vars)?, &expected, tolerance, "shard");
            }
        }
        Ok(())
    })
}
