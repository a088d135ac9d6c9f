//! PyTorch's `test_nn.py`.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::{
    Error, NonFinite, NormType, clip_grad_norm, clip_grad_norm_with, clip_grad_value,
    clip_grads_with_norm, total_norm,
};
use support::device::on_every_backend;
use support::gradients::{bits_of_gradients, random_values, store_for, store_of, tensor, values};
use support::oracle::{self, assert_all_close, assert_close};

use super::{EXACT, elements, in_wide_dtypes, options, vector};

/// Norm orders with the norm of [`t1_gradients`], and of the weight's alone.
const T1: [(f64, f64, f64); 6] = [
    (0.5, 451_287.26, 450_862.489_332),
    (1.0, 5050.01, 5050.0),
    (1.5, 1179.3574, 1_179.357_399),
    (2.0, 581.678_605, 581.678_605),
    (4.0, 212.792_402, 212.792_402),
    (f64::INFINITY, 100.0, 100.0),
];

/// The weight's gradients: 1 to 100.
fn t1_weight() -> [f64; 100] {
    std::array::from_fn(|i| i as f64 + 1.0)
}

/// A weight with gradients 1 to 100 and a bias with gradients 0.001.
fn t1_gradients(dtype: DType) -> candle_core::Result<[Tensor; 2]> {
    let weight = tensor(&t1_weight(), (10, 10), dtype)?;
    Ok([weight, tensor(&[0.001; 10], 10, dtype)?])
}

#[test]
fn t1_norm_after_is_the_limit_and_one_scale_is_common_to_all() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        for (p, norm, _) in T1 {
            let (vars, mut grads) = store_of(&t1_gradients(dtype)?)?;
            let before = elements(&grads, &vars)?;
            let returned =
                clip_grad_norm_with(&mut grads, &vars, &options(2.0, p, NonFinite::Error))?;
            assert_close(returned, norm, tolerance + 1e-7, &format!("norm {p}"));
            let after = total_norm(&grads, &vars, p.into())?;
            // PyTorch's eps of 1e-6 is 1e-8 of the smallest of these norms.
            let what = format!("norm {p} after");
            assert_close(after, 2.0, tolerance + 1.1e-8, &what);
            let scale = 2.0 / (returned + 1e-6);
            for (before, after) in before.iter().zip(elements(&grads, &vars)?) {
                let what = format!("scale of norm {p}");
                assert_close(after / before, scale, tolerance, &what);
            }
        }
        Ok(())
    })
}

#[test]
fn t2_the_two_halves_are_the_whole_to_the_bit() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        for (p, right, _) in T1 {
            let (vars, mut whole) = store_of(&t1_gradients(dtype)?)?;
            clip_grad_norm_with(&mut whole, &vars, &options(2.0, p, NonFinite::Error))?;
            let mut halves = store_for(&vars, &t1_gradients(dtype)?);
            let norm = total_norm(&halves, &vars, p.into())?;
            assert_close(norm, right, tolerance + 1e-7, &format!("norm {p}"));
            clip_grads_with_norm(&mut halves, &vars, 2.0, norm)?;
            assert_eq!(
                bits_of_gradients(&halves, &vars)?,
                bits_of_gradients(&whole, &vars)?
            );
            let after = total_norm(&halves, &vars, p.into())?;
            let what = format!("norm {p} after");
            assert_close(after, 2.0, tolerance + 1.1e-8, &what);
        }
        Ok(())
    })
}

#[test]
fn t3_small_gradients_stay_as_they_are() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        for (p, _, _) in T1 {
            let weight: Vec<f64> = random_values(100, 3).iter().map(|x| x / 1.25e4).collect();
            let weight = tensor(&weight, (10, 10), dtype)?;
            let bias = tensor(&[1.0 / 500.0; 10], 10, dtype)?;
            let (vars, mut grads) = store_of(&[weight, bias])?;
            let before = bits_of_gradients(&grads, &vars)?;
            let right = oracle::norm(&elements(&grads, &vars)?, p);
            let norm = clip_grad_norm_with(&mut grads, &vars, &options(2.0, p, NonFinite::Error))?;
            assert_close(norm, right, tolerance, &format!("norm {p}"));
            assert!(norm < 2.0, "norm {p} is {norm}");
            assert_eq!(bits_of_gradients(&grads, &vars)?, before, "norm {p}");
        }
        Ok(())
    })
}

/// PyTorch's has one tensor in place of a list, and another in a list of one. Here both are lists
/// of one out of a store of two; each is clipped by its own norm, and the other stays.
#[test]
fn t4_one_var_of_two_is_clipped_alone_in_every_order() -> Result<()> {
    in_wide_dtypes(|dtype, tolerance| {
        for (p, _, norm) in T1 {
            let what = format!("norm {p}");
            let weight = || tensor(&t1_weight(), (10, 10), dtype);
            let (vars, mut grads) = store_of(&[weight()?, weight()?])?;
            let [first, second] = [&vars[..1], &vars[1..]];
            let clip = options(2.0, p, NonFinite::Error);
            let right = t1_weight().map(|x| x * 2.0 / (norm + 1e-6));
            let returned = clip_grad_norm_with(&mut grads, first, &clip)?;
            assert_close(returned, norm, tolerance + 1e-8, &what);
            let alone = elements(&grads, first)?;
            assert_all_close(&alone, &right, tolerance + 1e-8, &what);
            assert_eq!(elements(&grads, second)?, t1_weight(), "{what}: the other");
            let returned = clip_grad_norm_with(&mut grads, second, &clip)?;
            assert_close(returned, norm, tolerance + 1e-8, &what);
            assert_eq!(elements(&grads, second)?, alone, "{what}: as the first");
            assert_eq!(elements(&grads, first)?, alone, "{what}: stays");
        }
        Ok(())
    })
}

#[test]
fn t5_no_vars_have_a_norm_of_zero_and_nothing_is_clipped() -> Result<()> {
    on_every_backend(|| {
        let (vars, mut grads) = store_of(&t1_gradients(DType::F32)?)?;
        let before = bits_of_gradients(&grads, &vars)?;
        let none: &[Var] = &[];
        for (p, _, _) in T1 {
            let norm = clip_grad_norm_with(&mut grads, none, &options(0.0, p, NonFinite::Error))?;
            assert_close(norm, 0.0, 0.0, "norm of nothing");
        }
        clip_grad_value(&mut grads, none, 0.0)?;
        assert_eq!(bits_of_gradients(&grads, &vars)?, before);
        Ok(())
    })
}

#[test]
fn t6_values_are_within_the_bound_with_and_without_a_missing_gradient() -> Result<()> {
    in_wide_dtypes(|dtype, _| {
        let weight: Vec<f64> = (-50..50).map(|x| f64::from(x) / 5.0).collect();
        let weight = tensor(&weight, (10, 10), dtype)?;
        let clamp = |x: &f64| x.clamp(-2.5, 2.5);
        let expected: Vec<f64> = values(&weight)?.iter().map(clamp).collect();
        for with_bias in [true, false] {
            let (vars, mut grads) = store_of(&[weight.copy()?, tensor(&[2.0; 10], 10, dtype)?])?;
            if !with_bias {
                grads.remove(&vars[1]);
            }
            clip_grad_value(&mut grads, &vars, 2.5)?;
            assert_eq!(elements(&grads, &vars[..1])?, expected);
            let bias = grads.get(&vars[1]).map(values).transpose()?;
            assert_eq!(bias, with_bias.then(|| vec![2.0; 10]));
        }
        let (vars, mut alone) = store_of(std::slice::from_ref(&weight))?;
        clip_grad_value(&mut alone, &vars, 2.5)?;
        assert_eq!(elements(&alone, &vars)?, expected);
        Ok(())
    })
}

const T7_POSITIVE: [f64; 5] = [0.1, 1.0, 2.0, 3.5, f64::INFINITY];
const T7_NEGATIVE: [f64; 5] = [-0.1, -1.0, -2.0, -3.5, f64::NEG_INFINITY];

/// A scalar in all or in one of ten elements, alone or behind a Var with a finite gradient.
#[derive(Debug, Clone, Copy)]
struct T7Layout {
    all: bool,
    with_finite_first: bool,
}

const T7_LAYOUTS: [T7Layout; 4] = [
    T7Layout {
        all: true,
        with_finite_first: false,
    },
    T7Layout {
        all: false,
        with_finite_first: false,
    },
    T7Layout {
        all: true,
        with_finite_first: true,
    },
    T7Layout {
        all: false,
        with_finite_first: true,
    },
];

impl T7Layout {
    fn gradients(self, scalar: f64) -> candle_core::Result<Vec<Tensor>> {
        let mut elements = [if self.all { scalar } else { 0.0 }; 10];
        elements[1] = scalar;
        let mut gradients = vec![vector(&elements)?];
        if self.with_finite_first {
            gradients.insert(0, vector(&[1.0])?);
        }
        Ok(gradients)
    }
}

#[test]
fn t7_non_finite_gradients_are_an_error_and_stay_or_are_let_through() -> Result<()> {
    on_every_backend(|| {
        for scalar in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
            for (layout, p) in T7_LAYOUTS.iter().flat_map(|l| T7_POSITIVE.map(|p| (l, p))) {
                let what = format!("{scalar} as {layout:?}, norm {p}");
                let (vars, mut grads) = store_of(&layout.gradients(scalar)?)?;
                let before = bits_of_gradients(&grads, &vars)?;
                let norm_type = NormType::from(p);
                match clip_grad_norm_with(&mut grads, &vars, &options(1.0, p, NonFinite::Error)) {
                    Err(Error::NonFinite {
                        var,
                        norm_type: order,
                        ..
                    }) => {
                        let bad = usize::from(layout.with_finite_first);
                        assert_eq!((var, order), (format!("var.{bad}"), norm_type), "{what}");
                    }
                    other => panic!("{what}: {other:?}"),
                }
                assert_eq!(bits_of_gradients(&grads, &vars)?, before, "{what}");
                let through = options(1.0, p, NonFinite::Propagate);
                let norm = clip_grad_norm_with(&mut grads, &vars, &through)?;
                assert_eq!(norm.is_nan(), scalar.is_nan(), "{what}: {norm}");
                assert!(!norm.is_finite(), "{what}: {norm}");
            }
        }
        Ok(())
    })
}

/// PyTorch calls 2e200 non-finite for the orders 2 and 3.5, as its powers overflow.
#[test]
fn t7_finite_gradients_are_never_an_error_however_large() -> Result<()> {
    on_every_backend(|| {
        for scalar in [2e22, -2e22, 2e200, -2e200] {
            for (layout, p) in T7_LAYOUTS.iter().flat_map(|l| T7_POSITIVE.map(|p| (l, p))) {
                let what = format!("{scalar} as {layout:?}, norm {p}");
                let (vars, mut grads) = store_of(&layout.gradients(scalar)?)?;
                let right = oracle::norm(&elements(&grads, &vars)?, p);
                let norm =
                    clip_grad_norm_with(&mut grads, &vars, &options(1.0, p, NonFinite::Error))?;
                assert_close(norm, right, EXACT, &what);
                assert_close(total_norm(&grads, &vars, p.into())?, 1.0, EXACT, &what);
            }
        }
        Ok(())
    })
}

/// PyTorch takes these orders, though they make no norms, and clips by what comes out.
#[test]
fn t7_orders_of_zero_and_below_are_an_error() -> Result<()> {
    on_every_backend(|| {
        for scalar in [1.0, 2e200, f64::INFINITY, f64::NAN] {
            for p in T7_NEGATIVE.into_iter().chain([0.0, -0.0, f64::NAN]) {
                let (vars, mut grads) = store_of(&T7_LAYOUTS[3].gradients(scalar)?)?;
                let before = bits_of_gradients(&grads, &vars)?;
                for policy in [NonFinite::Error, NonFinite::Propagate] {
                    let result = clip_grad_norm_with(&mut grads, &vars, &options(1.0, p, policy));
                    assert!(
                        matches!(result, Err(Error::InvalidNormType { .. })),
                        "{p}: {result:?}"
                    );
                }
                let result = total_norm(&grads, &vars, p.into());
                assert!(
                    matches!(result, Err(Error::InvalidNormType { .. })),
                    "{p}: {result:?}"
                );
                assert_eq!(bits_of_gradients(&grads, &vars)?, before, "norm {p}");
            }
        }
        Ok(())
    })
}

/// PyTorch's has two devices; here both are CPU, and what differs is the code that serves them.
#[test]
fn t8_every_backend_has_the_same_norm_and_gradients() -> Result<()> {
    on_every_backend(|| {
        for (p, norm) in [(2.0, 110f64.sqrt()), (f64::INFINITY, 1.0)] {
            let weight = tensor(&[1.0; 100], (10, 10), DType::F32)?;
            let (vars, mut grads) = store_of(&[weight, tensor(&[1.0; 10], 10, DType::F32)?])?;
            let returned =
                clip_grad_norm_with(&mut grads, &vars, &options(0.5, p, NonFinite::Error))?;
            assert_close(returned, norm, 1e-7, "norm");
            let expected = [0.5 / (norm + 1e-6); 110];
            assert_all_close(&elements(&grads, &vars)?, &expected, 1e-7, "gradients");
        }
        Ok(())
    })
}

/// PyTorch's norm of 1e20 is infinite and its gradients become 0: the squares pass f32's maximum.
#[test]
fn t9_large_f32_gradients_have_their_norm_and_infinite_ones_become_nan() -> Result<()> {
    on_every_backend(|| {
        let hundred = |value: f64| store_of(&[tensor(&[value; 100], 100, DType::F32)?]);
        for value in [1.0, 1e20] {
            let (vars, mut grads) = hundred(value)?;
            assert_close(
                clip_grad_norm(&mut grads, &vars, 1.0)?,
                10.0 * value,
                1e-7,
                "norm",
            );
            assert_all_close(&elements(&grads, &vars)?, &[0.1; 100], 1e-6, "gradients");
        }
        let (vars, mut grads) = hundred(f64::INFINITY)?;
        let before = bits_of_gradients(&grads, &vars)?;
        let result = clip_grad_norm(&mut grads, &vars, 1.0);
        assert!(
            matches!(result, Err(Error::NonFinite { infinite: 100, .. })),
            "{result:?}"
        );
        assert_eq!(bits_of_gradients(&grads, &vars)?, before);
        let through = options(1.0, 2.0, NonFinite::Propagate);
        let norm = clip_grad_norm_with(&mut grads, &vars, &through)?;
        assert_close(1.0 / norm, 0.0, 0.0, "one over the norm");
        assert!(elements(&grads, &vars)?.iter().all(|x| x.is_nan()));
        Ok(())
    })
}

#[test]
fn t10_clipping_the_sum_is_not_clipping_every_micro_batch() -> Result<()> {
    on_every_backend(|| {
        let [first, second] = [vector(&[2.0, 0.0])?, vector(&[0.0, 2.0])?];
        let (vars, mut once) = store_of(&[(&first + &second)?])?;
        assert_close(
            clip_grad_norm(&mut once, &vars, 1.0)?,
            8f64.sqrt(),
            EXACT,
            "norm",
        );
        assert_all_close(&elements(&once, &vars)?, &[0.5f64.sqrt(); 2], 1e-6, "once");
        let mut sum = [0.0; 2];
        for micro_batch in [first, second] {
            let mut grads = store_for(&vars, &[micro_batch]);
            assert_close(clip_grad_norm(&mut grads, &vars, 1.0)?, 2.0, EXACT, "norm");
            for (sum, x) in sum.iter_mut().zip(elements(&grads, &vars)?) {
                *sum += x;
            }
        }
        assert_all_close(&sum, &[1.0; 2], 1e-6, "every micro-batch");
        Ok(())
    })
}
