//! `weighted_power` against its equation, and its gradient against finite differences.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::Error;
use candle_grad_clip::loss::weighted_power;
use support::device::device;
use support::gradients::{random_values, tensor, values};
use support::oracle::{assert_all_close, assert_all_close_above, assert_close};

const POWERS: [f64; 7] = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0];
const N: usize = 12;

/// mean(w |e|^p)
fn equation(pred: &[f64], target: &[f64], weight: &[f64], power: f64) -> f64 {
    let term = |i: usize| weight[i] * (pred[i] - target[i]).abs().powf(power);
    (0..pred.len()).map(term).sum::<f64>() / pred.len() as f64
}

#[test]
fn the_value_is_the_equation() -> Result<()> {
    let [pred, target, weight] = [1, 2, 3].map(|seed| random_values(N, seed));
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
        for power in POWERS {
            let [p, t, w] = [&pred, &target, &weight].map(|v| tensor(v, (3, 4), dtype));
            let loss = weighted_power(&p?, &t?, &w?, power)?;
            assert_eq!((loss.dims(), loss.dtype()), (&[] as &[usize], dtype));
            let right = equation(&pred, &target, &weight, power);
            // The weights have both signs here, so terms may cancel.
            let error = (values(&loss)?[0] - right).abs();
            assert!(
                error <= tolerance * 10.0,
                "power {power} in {dtype:?}: {error:e}"
            );
        }
    }
    Ok(())
}

#[test]
fn gradients_of_all_three_are_those_of_finite_differences() -> Result<()> {
    let inputs = [1, 2, 3].map(|seed| random_values(N, seed));
    for power in POWERS {
        let vars = inputs
            .each_ref()
            .map(|v| Var::from_tensor(&tensor(v, (3, 4), DType::F64).unwrap()).unwrap());
        let grads = weighted_power(&vars[0], &vars[1], &vars[2], power)?.backward()?;
        for (which, var) in vars.iter().enumerate() {
            let ours = values(grads.get(var).unwrap())?;
            let difference = |i: usize| {
                let at = |step: f64| {
                    let mut moved = inputs.clone();
                    moved[which][i] += step;
                    equation(&moved[0], &moved[1], &moved[2], power)
                };
                (at(1e-6) - at(-1e-6)) / 2e-6
            };
            let right: Vec<f64> = (0..N).map(difference).collect();
            let what = format!("power {power}, input {which}");
            // Roundings of 1e-16 in losses of about 1, divided by 2e-6.
            assert_all_close_above(&ours, &right, 1e-6, 1e-9, &what);
        }
    }
    Ok(())
}

#[test]
fn the_gradient_is_the_closed_form_in_both_dtypes() -> Result<()> {
    let [pred, target, weight] = [1, 2, 3].map(|seed| random_values(N, seed));
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::F64, 1e-14)] {
        for power in POWERS {
            let var = Var::from_tensor(&tensor(&pred, N, dtype)?)?;
            let [t, w] = [&target, &weight].map(|v| tensor(v, N, dtype));
            let grads = weighted_power(&var, &t?, &w?, power)?.backward()?;
            let closed = |i: usize| {
                let e = pred[i] - target[i];
                weight[i] * power * e.abs().powf(power - 1.0) * e.signum() / N as f64
            };
            let right: Vec<f64> = (0..N).map(closed).collect();
            let ours = values(grads.get(&var).unwrap())?;
            assert_all_close(
                &ours,
                &right,
                tolerance * 20.0,
                &format!("power {power} {dtype:?}"),
            );
        }
    }
    Ok(())
}

#[test]
fn the_gradient_at_zero_error_is_zero() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        for power in POWERS {
            let target = tensor(&[1.0, -2.0, 0.0], 3, dtype)?;
            let (pred, weight) = (Var::from_tensor(&target)?, Var::ones(3, dtype, device())?);
            let loss = weighted_power(&pred, &target, &weight, power)?;
            assert_eq!(values(&loss)?, [0.0]);
            let grads = loss.backward()?;
            for var in [&pred, &weight] {
                assert_eq!(
                    values(grads.get(var).unwrap())?,
                    [0.0; 3],
                    "power {power} {dtype:?}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn the_gradient_is_finite_near_zero() -> Result<()> {
    for power in POWERS {
        for error in [1e-45, 1e-38, -1e-30, 1e-7, -1e-3] {
            let pred = Var::from_tensor(&tensor(&[error], 1, DType::F32)?)?;
            let zero = Tensor::zeros(1, DType::F32, device())?;
            let one = Tensor::ones(1, DType::F32, device())?;
            let grads = weighted_power(&pred, &zero, &one, power)?.backward()?;
            let slope = values(grads.get(&pred).unwrap())?[0];
            assert!(
                slope.is_finite() && slope.abs() <= power,
                "power {power} at {error:e}: {slope}"
            );
        }
    }
    Ok(())
}

#[test]
fn shapes_broadcast_and_gradients_come_back_in_theirs() -> Result<()> {
    let shapes: [[&[usize]; 3]; 5] = [
        [&[3, 4], &[4], &[]],
        [&[4], &[3, 4], &[3, 1]],
        [&[3, 1], &[1, 4], &[3, 4]],
        [&[], &[2, 2], &[2]],
        [&[1], &[1], &[5]], // the weight is the largest: the mean is over its shape
    ];
    for shapes in shapes {
        let make = |(shape, seed): (&&[usize], u64)| {
            let values = random_values(shape.iter().product(), seed);
            Var::from_tensor(&tensor(&values, *shape, DType::F64)?)
        };
        let vars: Vec<Var> = shapes
            .iter()
            .zip(1..)
            .map(make)
            .collect::<candle_core::Result<_>>()?;
        let loss = weighted_power(&vars[0], &vars[1], &vars[2], 3.0)?;
        let e = vars[0].broadcast_sub(&vars[1])?;
        let right = e.abs()?.powf(3.0)?.broadcast_mul(&vars[2])?.mean_all()?;
        assert_close(
            values(&loss)?[0],
            values(&right)?[0],
            1e-12,
            &format!("{shapes:?}"),
        );
        let grads = loss.backward()?;
        for var in &vars {
            assert_eq!(grads.get(var).unwrap().dims(), var.dims(), "{shapes:?}");
        }
    }
    Ok(())
}

#[test]
fn strided_inputs_are_read_right() -> Result<()> {
    let pred = tensor(&random_values(N, 1), (3, 4), DType::F64)?;
    let target = tensor(&random_values(N, 2), (3, 4), DType::F64)?;
    let weight = Tensor::ones((), DType::F64, device())?;
    let straight = weighted_power(&pred, &target, &weight, 3.0)?;
    let transposed = weighted_power(&pred.t()?, &target.t()?, &weight, 3.0)?;
    assert_close(
        values(&transposed)?[0],
        values(&straight)?[0],
        1e-14,
        "transposed",
    );
    Ok(())
}

#[test]
fn a_bad_power_and_inputs_that_do_not_fit_are_errors() -> Result<()> {
    let x = Tensor::ones(3, DType::F32, device())?;
    for power in [0.0, 0.999, -1.0, f64::NAN, f64::INFINITY] {
        let error = weighted_power(&x, &x, &x, power).unwrap_err();
        assert!(
            matches!(error, Error::InvalidOption { name: "power", .. }),
            "{error}"
        );
    }
    let other = Tensor::ones(4, DType::F32, device())?;
    let double = Tensor::ones(3, DType::F64, device())?;
    for y in [other, double] {
        assert!(matches!(
            weighted_power(&x, &y, &x, 2.0),
            Err(Error::Candle(_))
        ));
        assert!(matches!(
            weighted_power(&x, &x, &y, 2.0),
            Err(Error::Candle(_))
        ));
    }
    Ok(())
}
