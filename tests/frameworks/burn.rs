//! burn's tests of gradient clipping.

use anyhow::Result;
use candle_core::DType;
use candle_grad_clip::{clip_grad_norm, clip_grad_value};
use support::device::on_every_backend;
use support::gradients::{store_for, store_of, tensor, values};
use support::oracle::{assert_all_close, assert_close};

use super::{elements, in_wide_dtypes};

#[rustfmt::skip]
const BURN: [f64; 12] = [
    0.6294, 0.0940, 0.8176, 0.8824, 0.5228, 0.4310,
    0.7152, 0.9559, 0.7893, 0.5684, 0.5939, 0.8883,
];

/// [`BURN`] as a dtype has it.
fn burn(dtype: DType) -> Result<[f64; 12]> {
    let rounded = values(&tensor(&BURN, 12, dtype)?)?;
    Ok(std::array::from_fn(|i| rounded[i]))
}

#[test]
fn value_and_norm_of_a_matrix() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        let (vars, mut grads) = store_of(&[tensor(&BURN, (2, 6), dtype)?])?;
        clip_grad_value(&mut grads, &vars, 0.5)?;
        assert_eq!(elements(&grads, &vars)?, burn(dtype)?.map(|x| x.min(0.5)));
        let mut grads = store_for(&vars, &[tensor(&BURN, (2, 6), dtype)?]);
        let norm = clip_grad_norm(&mut grads, &vars, 2.2)?;
        assert_close(norm, 2.413_355, tolerance + 5e-7, "norm");
        let after = elements(&grads, &vars)?;
        assert_all_close(
            &after,
            &BURN.map(|x| x * 0.911_594),
            tolerance + 1e-6,
            "at 2.2",
        );
        assert_close(
            after.iter().copied().fold(0.0, f64::max),
            0.871_393,
            tolerance + 1e-6,
            "largest",
        );
        Ok(())
    })
}

#[test]
fn a_norm_below_the_limit_changes_nothing() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        let small = [0.3, 0.4, 0.5, 0.2, 0.1, 0.6, 0.3, 0.4];
        let (vars, mut grads) = store_of(&[tensor(&small, (2, 4), dtype)?])?;
        let before = elements(&grads, &vars)?;
        assert_close(
            clip_grad_norm(&mut grads, &vars, 2.2)?,
            1.0770,
            tolerance + 1e-4,
            "norm",
        );
        assert_eq!(elements(&grads, &vars)?, before);
        Ok(())
    })
}

#[test]
fn only_the_vars_that_are_asked_for_are_clipped() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        let gradients = [tensor(&BURN, (2, 6), dtype)?, tensor(&BURN, (6, 2), dtype)?];
        let (vars, mut grads) = store_of(&gradients)?;
        let (layer_a, layer_b) = vars.split_at(1);
        clip_grad_norm(&mut grads, layer_a, 0.1)?;
        clip_grad_value(&mut grads, layer_a, 0.02)?;
        assert!(
            elements(&grads, layer_a)?
                .iter()
                .all(|x| *x <= 0.02 * (1.0 + tolerance))
        );
        assert_eq!(elements(&grads, layer_b)?, burn(dtype)?);
        Ok(())
    })
}

/// burn's issue 5699: 300 squared passes f16's maximum.
#[test]
fn f16_300_at_norm_1_is_1() -> Result<()> {
    on_every_backend(|| {
        let (vars, mut grads) = store_of(&[tensor(&[300.0], 1, DType::F16)?])?;
        assert_close(clip_grad_norm(&mut grads, &vars, 1.0)?, 300.0, 1e-7, "norm");
        assert_all_close(&elements(&grads, &vars)?, &[1.0], 1e-3, "gradient");
        Ok(())
    })
}
