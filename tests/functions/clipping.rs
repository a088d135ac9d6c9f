//! The free functions keep what they promise, for every dtype and backend.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_grad_clip::backend;
use candle_grad_clip::{
    ClipGradNorm, NormType, clip_by_global_norm, clip_grad_norm, clip_grad_norm_with,
    clip_grad_value, clip_grads_with_norm, total_norm,
};
use support::device::{backends, kernels};
use support::gradients::{
    all_values, bits_of_gradients, copies, gradients_of, random_values, store_of, tensor,
};
use support::oracle::{self, assert_all_close, assert_close, tolerance};
use support::registry::DTYPES;

const NORM_TYPES: [NormType; 5] = [
    NormType::L1,
    NormType::L2,
    NormType::Inf,
    NormType::P(0.5),
    NormType::P(3.0),
];

/// Calls `promise` with gradients of every dtype, on every backend, and the tolerance there.
fn for_every_table(promise: impl Fn(&[Tensor], f64, &str) -> Result<()>) -> Result<()> {
    for dtypes in DTYPES {
        for backend in backends() {
            let shapes: [&[usize]; 4] = [&[7, 5], &[11], &[], &[2, 3, 2]];
            let gradient = |(i, shape): (usize, &&[usize])| {
                let values = random_values(shape.iter().product(), i as u64);
                tensor(&values, *shape, dtypes[i % dtypes.len()])
            };
            let gradients: Vec<Tensor> = shapes
                .iter()
                .enumerate()
                .map(gradient)
                .collect::<candle_core::Result<_>>()?;
            let floor = if backend == kernels() { 1e-12 } else { 2e-6 };
            let tolerance = dtypes.iter().map(|d| tolerance(*d)).fold(floor, f64::max);
            let what = format!("{dtypes:?} {backend:?}");
            backend::with_backend(backend, || promise(&gradients, tolerance, &what))?;
        }
    }
    Ok(())
}

#[test]
fn after_clipping_the_norm_is_the_bound_and_the_direction_is_kept() -> Result<()> {
    for_every_table(|gradients, tolerance, what| {
        for norm_type in NORM_TYPES {
            let what = format!("{what}, {norm_type}-norm");
            let (vars, mut store) = store_of(&copies(gradients)?)?;
            let before = all_values(gradients)?;
            let right = oracle::norm(&before, norm_type.p());
            let options = ClipGradNorm {
                max_norm: right / 8.0,
                norm_type,
                ..ClipGradNorm::default()
            };
            let returned = clip_grad_norm_with(&mut store, &vars, &options)?;
            assert_close(returned, right, tolerance, &what);
            let after = all_values(&gradients_of(&store, &vars)?)?;
            let norm = oracle::norm(&after, norm_type.p());
            assert_close(norm, options.max_norm, tolerance + 1e-5, &what);
            let scaled: Vec<f64> = before.iter().map(|x| x / 8.0).collect();
            assert_all_close(&after, &scaled, tolerance + 1e-5, &what);
        }
        Ok(())
    })
}

#[test]
fn clipping_again_changes_nothing() -> Result<()> {
    for_every_table(|gradients, tolerance, what| {
        for norm_type in NORM_TYPES {
            let what = format!("{what}, {norm_type}-norm");
            let (vars, mut store) = store_of(&copies(gradients)?)?;
            let options = ClipGradNorm {
                max_norm: 0.5,
                norm_type,
                ..ClipGradNorm::default()
            };
            clip_grad_norm_with(&mut store, &vars, &options)?;
            let once = all_values(&gradients_of(&store, &vars)?)?;
            clip_grad_norm_with(&mut store, &vars, &options)?;
            let twice = all_values(&gradients_of(&store, &vars)?)?;
            // The norm is now max_norm / (1 + eps), so the second coefficient is 1 to eps /
            // max_norm.
            assert_all_close(&twice, &once, tolerance + 2e-6, &what);
        }
        Ok(())
    })
}

#[test]
fn below_the_limit_no_bit_changes() -> Result<()> {
    for_every_table(|gradients, _, what| {
        let (vars, mut store) = store_of(gradients)?;
        let before = bits_of_gradients(&store, &vars)?;
        for norm_type in NORM_TYPES {
            let options = ClipGradNorm {
                max_norm: 1e6,
                norm_type,
                ..ClipGradNorm::default()
            };
            clip_grad_norm_with(&mut store, &vars, &options)?;
        }
        clip_grad_norm(&mut store, &vars, f64::INFINITY)?;
        clip_grad_value(&mut store, &vars, 1e4)?;
        clip_grad_value(&mut store, &vars, f64::INFINITY)?;
        clip_grads_with_norm(&mut store, &vars, 1.0, 0.5)?;
        assert_eq!(bits_of_gradients(&store, &vars)?, before, "{what}");
        Ok(())
    })
}

#[test]
fn value_clipping_is_the_clamp_of_every_element() -> Result<()> {
    for_every_table(|gradients, _, what| {
        let (vars, mut store) = store_of(&copies(gradients)?)?;
        clip_grad_value(&mut store, &vars, 0.5)?;
        let right: Vec<f64> = all_values(gradients)?
            .iter()
            .map(|x| x.clamp(-0.5, 0.5))
            .collect();
        assert_eq!(all_values(&gradients_of(&store, &vars)?)?, right, "{what}");
        Ok(())
    })
}

#[test]
fn measuring_and_scaling_apart_is_clipping_at_once() -> Result<()> {
    for_every_table(|gradients, _, what| {
        let (vars, mut at_once) = store_of(&copies(gradients)?)?;
        let norm = clip_grad_norm(&mut at_once, &vars, 0.5)?;
        let right = bits_of_gradients(&at_once, &vars)?;

        let (vars, mut apart) = store_of(&copies(gradients)?)?;
        assert_eq!(total_norm(&apart, &vars, NormType::L2)?, norm, "{what}");
        clip_grads_with_norm(&mut apart, &vars, 0.5, norm)?;
        assert_eq!(bits_of_gradients(&apart, &vars)?, right, "{what}");
        Ok(())
    })
}

#[test]
fn clip_by_global_norm_leaves_its_input_and_has_no_eps() -> Result<()> {
    for_every_table(|gradients, tolerance, what| {
        let (vars, store) = store_of(gradients)?;
        let before = bits_of_gradients(&store, &vars)?;
        let right = oracle::norm(&all_values(gradients)?, 2.0);
        for use_norm in [None, Some(right)] {
            let (clipped, norm) = clip_by_global_norm(&store, &vars, 0.5, use_norm)?;
            assert_close(norm, right, tolerance, what);
            assert_eq!(bits_of_gradients(&store, &vars)?, before, "{what}");
            let after = all_values(&gradients_of(&clipped, &vars)?)?;
            let scaled: Vec<f64> = all_values(gradients)?
                .iter()
                .map(|x| x * 0.5 / right)
                .collect();
            assert_all_close(&after, &scaled, tolerance, what);
        }
        Ok(())
    })
}

#[test]
fn clip_by_global_norm_below_the_limit_shares_storage() -> Result<()> {
    let (vars, store) = store_of(&[tensor(&[3.0, 4.0], 2, DType::F32)?])?;
    let (mut same, _) = clip_by_global_norm(&store, &vars, 10.0, None)?;
    clip_grad_value(&mut same, &vars, 1.0)?; // in place: seen through both, if they share
    let seen = all_values(&gradients_of(&store, &vars)?)?;
    assert_eq!(
        seen,
        [1.0, 1.0],
        "what is not changed shares its storage with `grads`"
    );
    Ok(())
}

#[test]
fn a_limit_of_zero_gives_zeros() -> Result<()> {
    for_every_table(|gradients, _, what| {
        let zeros: Vec<Tensor> = gradients
            .iter()
            .map(Tensor::zeros_like)
            .collect::<candle_core::Result<_>>()?;
        for gradients in [copies(gradients)?, zeros] {
            let n = all_values(&gradients)?.len();
            for limit in [0.0, -0.0] {
                let (vars, mut store) = store_of(&copies(&gradients)?)?;
                clip_grad_norm(&mut store, &vars, limit)?;
                assert_eq!(
                    all_values(&gradients_of(&store, &vars)?)?,
                    vec![0.0; n],
                    "{what}"
                );

                let (vars, mut store) = store_of(&copies(&gradients)?)?;
                clip_grad_value(&mut store, &vars, limit)?;
                assert_eq!(
                    all_values(&gradients_of(&store, &vars)?)?,
                    vec![0.0; n],
                    "{what}"
                );

                let (vars, store) = store_of(&gradients)?;
                let (clipped, _) = clip_by_global_norm(&store, &vars, limit, None)?;
                assert_eq!(
                    all_values(&gradients_of(&clipped, &vars)?)?,
                    vec![0.0; n],
                    "{what}"
                );
            }
        }
        Ok(())
    })
}

#[test]
fn only_the_vars_count() -> Result<()> {
    for_every_table(|gradients, tolerance, what| {
        let (vars, mut store) = store_of(&copies(gradients)?)?;
        let others = &vars[..2];
        let right = oracle::norm(&all_values(&gradients[..2])?, 2.0);
        let rest = bits_of_gradients(&store, &vars[2..])?;
        assert_close(
            total_norm(&store, others, NormType::L2)?,
            right,
            tolerance,
            what,
        );
        assert_close(
            clip_grad_norm(&mut store, others, 0.5)?,
            right,
            tolerance,
            what,
        );
        assert_eq!(
            bits_of_gradients(&store, &vars[2..])?,
            rest,
            "{what}: left alone"
        );
        Ok(())
    })
}
