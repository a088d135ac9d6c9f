//! What the other frameworks have no test of, and get wrong.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::{
    Error, NonFinite, NormType, clip_by_global_norm, clip_grad_norm, clip_grad_norm_with,
    clip_grad_value, clip_grads_with_norm, total_norm,
};
use support::device::{device, on_every_backend};
use support::gradients::{
    FLOATS, bits_of_gradients, random_values, store_for, store_of, tensor, values,
};
use support::oracle::{assert_all_close, assert_close};

use super::{EXACT, elements, options, vector};

#[test]
fn a_constant_operand_is_not_counted() -> Result<()> {
    on_every_backend(|| {
        let w = Var::from_tensor(&vector(&[3.0, 4.0])?)?;
        let constant = vector(&[6.0, 8.0])?;
        let mut grads = (w.as_tensor() * &constant)?.sum_all()?.backward()?;
        assert!(
            grads.get(&constant).is_some(),
            "the store has the constant's gradient"
        );
        let vars = [w];
        assert_close(clip_grad_norm(&mut grads, &vars, 1.0)?, 10.0, EXACT, "norm");
        assert_all_close(&elements(&grads, &vars)?, &[0.6, 0.8], 1e-6, "gradient");
        let of_constant = grads.get(&constant).map(values).transpose()?;
        assert_eq!(of_constant, Some(vec![3.0, 4.0]), "what is not asked for");
        Ok(())
    })
}

#[test]
fn a_tied_var_counts_once() -> Result<()> {
    on_every_backend(|| {
        let w = Var::from_tensor(&vector(&[1.0, 1.0])?)?;
        let [a, b] = [vector(&[1.0, 4.0])?, vector(&[2.0, 0.0])?];
        let (embed, head) = (
            (w.as_tensor() * a)?.sum_all()?,
            (w.as_tensor() * b)?.sum_all()?,
        );
        let mut grads = (embed + head)?.backward()?;
        let tied = [w.clone(), w];
        assert_close(
            total_norm(&grads, &tied, NormType::L1)?,
            7.0,
            EXACT,
            "L1 norm",
        );
        assert_close(clip_grad_norm(&mut grads, &tied, 1.0)?, 5.0, EXACT, "norm");
        assert_all_close(
            &elements(&grads, &tied[..1])?,
            &[0.6, 0.8],
            1e-6,
            "scaled once",
        );
        Ok(())
    })
}

#[test]
fn a_gradient_of_another_shape_is_an_error() -> Result<()> {
    on_every_backend(|| {
        let var = Var::zeros((2, 3), DType::F32, device())?;
        let vars = [var];
        let mut grads = store_for(&vars, &[tensor(&[1.0; 6], (3, 2), DType::F32)?]);
        for result in [
            clip_grad_value(&mut grads, &vars, 0.5),
            clip_grad_norm(&mut grads, &vars, 0.5).map(drop),
            clip_grads_with_norm(&mut grads, &vars, 0.5, 1.0),
            clip_by_global_norm(&grads, &vars, 0.5, None).map(drop),
            total_norm(&grads, &vars, NormType::L2).map(drop),
        ] {
            let is_named = matches!(&result, Err(Error::Mismatch { var, property: "shape", .. }) if var == "var.0");
            assert!(is_named, "{result:?}");
        }
        assert_eq!(elements(&grads, &vars)?, [1.0; 6]);
        Ok(())
    })
}

#[test]
fn an_f16_gradient_and_a_coefficient_that_f16_cannot_hold() -> Result<()> {
    on_every_backend(|| {
        let (vars, mut grads) = store_of(&[tensor(&[60_000.0], 1, DType::F16)?])?;
        clip_grad_norm(&mut grads, &vars, 6e-4)?; // a coefficient of 1e-8
        let after = elements(&grads, &vars)?[0];
        assert_close(after, 6e-4, 1e-3, "gradient");
        Ok(())
    })
}

#[test]
fn a_hundred_thousand_bf16_ones() -> Result<()> {
    on_every_backend(|| {
        let (vars, grads) = store_of(&[tensor(&vec![1.0; 100_000], 100_000, DType::BF16)?])?;
        let norm = total_norm(&grads, &vars, NormType::L2)?;
        assert_close(norm, 1e5f64.sqrt(), EXACT, "norm");
        assert_close(
            total_norm(&grads, &vars, NormType::L1)?,
            1e5,
            EXACT,
            "L1 norm",
        );
        Ok(())
    })
}

/// Wherever the NaN is: candle's own maximum loses one that does not come first.
#[test]
fn a_nan_means_the_same_on_every_backend() -> Result<()> {
    on_every_backend(|| {
        for (dtype, position) in FLOATS.into_iter().flat_map(|d| [0, 3, 6].map(|i| (d, i))) {
            for p in [0.5, 1.0, 2.0, 3.0, f64::INFINITY] {
                let mut gradient = [1.0; 7];
                gradient[position] = f64::NAN;
                let gradients = || -> Result<[Tensor; 2]> {
                    Ok([tensor(&gradient, 7, dtype)?, tensor(&[1.0], 1, dtype)?])
                };
                let (vars, mut grads) = store_of(&gradients()?)?;
                let what = format!("{dtype:?} at {position}, norm {p}");
                assert!(total_norm(&grads, &vars, p.into())?.is_nan(), "{what}");
                let through = options(1.0, p, NonFinite::Propagate);
                assert!(
                    clip_grad_norm_with(&mut grads, &vars, &through)?.is_nan(),
                    "{what}"
                );
                assert!(
                    elements(&grads, &vars)?.iter().all(|x| x.is_nan()),
                    "{what}"
                );
                let mut grads = store_for(&vars, &gradients()?);
                clip_grad_value(&mut grads, &vars, 0.5)?;
                let after = elements(&grads, &vars)?;
                for (i, x) in after.iter().enumerate() {
                    let is_right = if i == position {
                        x.is_nan()
                    } else {
                        (x - 0.5).abs() < EXACT
                    };
                    assert!(is_right, "{what}: {after:?}");
                }
            }
        }
        Ok(())
    })
}

#[test]
fn two_runs_give_the_same_bits() -> Result<()> {
    on_every_backend(|| {
        for p in [0.5, 1.0, 2.0, 3.0, f64::INFINITY] {
            let run = || -> Result<_> {
                let large = tensor(&random_values(200_000, 1), (400, 500), DType::F32)?;
                let gradients = [large, tensor(&random_values(17, 2), 17, DType::F32)?];
                let (vars, mut grads) = store_of(&gradients)?;
                let clip = options(0.5, p, NonFinite::Error);
                let norm = clip_grad_norm_with(&mut grads, &vars, &clip)?;
                Ok((norm.to_bits(), bits_of_gradients(&grads, &vars)?))
            };
            assert_eq!(run()?, run()?, "norm {p}");
        }
        Ok(())
    })
}
