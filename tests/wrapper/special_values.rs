//! NaN, infinities, zeros with a sign and the ends of f32, on every backend.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend::{self, Backend};
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{
    Clip, ClipGradNorm, ClippedOptimizer, Error, GradAccumulator, NonFinite, NormType,
    clip_grad_norm_with, clip_grad_value, total_norm,
};
use candle_nn::{Optimizer, ParamsAdamW};
use support::device::backends;
use support::gradients::{gradients_of, store_for, store_of, tensor, values};
use support::oracle::{self};

use super::non_finite::every_bad_value;

/// Gradients of every size that f32 has, whose squares it does not.
fn sizes_of_f32() -> [f64; 8] {
    [1.5e-45, 1e-40, 1.2e-38, 1e-20, 1.0, 1e20, 8.5e37, 3.4e38]
}

#[test]
fn gradients_at_the_ends_of_f32_are_measured_and_clipped_by_candles_operations() -> Result<()> {
    for size in sizes_of_f32() {
        for n in [1, 3, 1024, 1025, 5000] {
            let gradient = tensor(&vec![-size; n], n, DType::F32)?;
            let exact = values(&gradient)?;
            for p in [0.5, 1.0, 2.0, 3.0, f64::INFINITY] {
                let what = format!("{n} of {size:e}, {p}-norm");
                let (vars, mut store) = store_of(std::slice::from_ref(&gradient))?;
                let right = oracle::norm(&exact, p);
                let norm = backend::with_backend(Backend::CandleOps, || {
                    total_norm(&store, &vars, NormType::from(p))
                })?;
                oracle::assert_close(norm, right, 2e-6, &what);
                let options = ClipGradNorm {
                    max_norm: 1.0,
                    norm_type: NormType::from(p),
                    ..ClipGradNorm::default()
                };
                backend::with_backend(Backend::CandleOps, || {
                    clip_grad_norm_with(&mut store, &vars, &options)
                })?;
                let clipped = values(&gradients_of(&store, &vars)?[0])?;
                let coef = oracle::clip_coef(right, 1.0, 1e-6);
                oracle::assert_close(clipped[0], exact[0] * coef, 1e-5, &what);
            }
        }
    }
    Ok(())
}

/// One NaN among many elements, in the middle of a row and in the rest behind the rows.
#[test]
fn candles_operations_count_zero_and_keep_every_bad_value() -> Result<()> {
    for (n, place) in [(1, 0), (700, 3), (3000, 1500), (3000, 2999)] {
        for bad in every_bad_value() {
            for other in [0.25, 8.5e37] {
                let mut elements = vec![other; n];
                elements[place] = bad;
                let gradient = tensor(&elements, n, DType::F32)?;
                let what = format!("{bad} at {place} of {n}, others {other}");
                let (vars, mut store) = store_of(std::slice::from_ref(&gradient))?;
                for p in [1.0, 2.0, 3.0, f64::INFINITY] {
                    let options = ClipGradNorm {
                        norm_type: NormType::from(p),
                        ..ClipGradNorm::default()
                    };
                    store.insert(&vars[0], gradient.clone());
                    let error = backend::with_backend(Backend::CandleOps, || {
                        clip_grad_norm_with(&mut store, &vars, &options)
                    })
                    .unwrap_err();
                    let is_right = matches!(&error, Error::NonFinite { nan, infinite, .. }
                        if (*nan, *infinite) == if bad.is_nan() { (1, 0) } else { (0, 1) });
                    assert!(is_right, "{what}, {p}-norm: {error:?}");
                    let options = ClipGradNorm {
                        non_finite: NonFinite::Zero,
                        ..options
                    };
                    backend::with_backend(Backend::CandleOps, || {
                        clip_grad_norm_with(&mut store, &vars, &options)
                    })?;
                    let zeroed = values(&gradients_of(&store, &vars)?[0])?;
                    assert_eq!(zeroed[place], 0.0, "{what}, {p}-norm");
                    assert!(zeroed.iter().all(|x| x.is_finite()), "{what}, {p}-norm");
                }
                store.insert(&vars[0], gradient.clone());
                backend::with_backend(Backend::CandleOps, || {
                    clip_grad_value(&mut store, &vars, 0.5)
                })?;
                let clamped = values(&gradients_of(&store, &vars)?[0])?;
                let right = bad.clamp(-0.5, 0.5);
                let same = clamped[place].to_bits() == right.to_bits();
                assert!(same || clamped[place].is_nan() && bad.is_nan(), "{what}");
            }
        }
    }
    Ok(())
}

/// Fast math lets a compiler take every comparison with a NaN as it likes: none may decide.
#[test]
fn candle_ops_ask_no_device_whether_a_value_is_finite() {
    let sources = [
        include_str!("../../crates/candle-grad-clip/src/backend/candle_ops/edit.rs"),
        include_str!("../../crates/candle-grad-clip/src/backend/candle_ops/measure.rs"),
        include_str!("../../crates/candle-grad-clip/src/backend/candle_ops/powers.rs"),
        include_str!("../../crates/candle-grad-clip/src/backend/candle_ops/tensor_ops.rs"),
        include_str!("../../crates/candle-grad-clip/src/backend/candle_ops/units.rs"),
    ];
    let calls = |name: &str| -> usize { sources.iter().map(|s| s.matches(name).count()).sum() };
    for name in [
        ".ne(",
        ".eq(",
        ".le(",
        ".lt(",
        ".ge(",
        ".where_cond(",
        "broadcast_div(",
        ".copy()",
    ] {
        assert_eq!(calls(name), 0, "{name}");
    }
    assert_eq!(
        calls(".gt("),
        1,
        "the count of clamped elements, used if all are finite"
    );
}

fn is_minus_zero(x: f64) -> bool {
    x == 0.0 && x.is_sign_negative()
}

#[test]
fn minus_zero_keeps_its_sign_on_every_backend() -> Result<()> {
    for backend in backends() {
        let gradient = tensor(&[-0.0, 3.0, 4.0], 3, DType::F32)?;
        let (vars, mut store) = store_of(std::slice::from_ref(&gradient))?;
        let mut sum = GradAccumulator::mean(vars.clone());
        let first_of_mean = backend::with_backend(backend, || -> Result<f64> {
            clip_grad_norm_with(&mut store, &vars, &ClipGradNorm::default())?;
            sum.add(&store)?;
            sum.add(&store)?;
            let mean = sum.take_grads()?.unwrap();
            Ok(values(&gradients_of(mean, &vars)?[0])?[0])
        })?;
        let clipped = values(&gradients_of(&store, &vars)?[0])?[0];
        assert!(is_minus_zero(clipped), "{backend:?}: clipped");
        assert!(is_minus_zero(first_of_mean), "{backend:?}: a mean");

        let w = Var::from_tensor(&tensor(&[-0.0, 1.0, 1.0], 3, DType::F32)?)?;
        let params = ParamsAdamW {
            lr: 0.1,
            weight_decay: 0.1,
            ..ParamsAdamW::default()
        };
        let adamw = AdamW::new(vec![w.clone()], params)?;
        let mut opt = ClippedOptimizer::wrap(adamw, vec![w.clone()], Clip::norm(1.0))?;
        let zero = tensor(&[0.0, 1.0, 1.0], 3, DType::F32)?;
        backend::with_backend(backend, || {
            opt.step(&store_for(std::slice::from_ref(&w), &[zero]))
        })?;
        assert!(
            is_minus_zero(values(w.as_tensor())?[0]),
            "{backend:?}: a weight"
        );
    }
    Ok(())
}

/// The two walks that have not measured what they edit: sums of micro-batches, and an optimizer
/// with more Vars than are clipped.
#[test]
fn zero_reaches_what_was_not_measured_before() -> Result<()> {
    for backend in backends() {
        let bad = tensor(&[1.0, f64::NAN, f64::INFINITY], 3, DType::F32)?;
        let (vars, store) = store_of(std::slice::from_ref(&bad))?;
        let mut sum = GradAccumulator::mean(vars.clone()).non_finite(NonFinite::Zero);
        let mean = backend::with_backend(backend, || -> Result<Vec<f64>> {
            sum.add(&store)?;
            Ok(values(
                &gradients_of(sum.take_grads()?.unwrap(), &vars)?[0],
            )?)
        })?;
        assert_eq!(mean, [1.0, 0.0, 0.0], "{backend:?}: a mean");

        let train = |clip: Clip, gradient: &Tensor| -> Result<Vec<f64>> {
            let zeros = tensor(&[0.0; 3], 3, DType::F32)?;
            let vars = [Var::from_tensor(&zeros)?, Var::from_tensor(&zeros)?];
            let sgd = Sgd::new(vars.to_vec(), ParamsSgd::from(1.0))?;
            let clipped = vec![vars[1].clone()];
            let mut opt = ClippedOptimizer::wrap_allow_unclipped(sgd, clipped, clip, &["*"])?;
            let store = store_for(&vars, &[zeros, gradient.clone()]);
            backend::with_backend(backend, || opt.step(&store))?;
            Ok(values(vars[1].as_tensor())?)
        };
        let stepped = train(Clip::norm(10.0).non_finite(NonFinite::Zero), &bad)?;
        assert_eq!(stepped, [-1.0, 0.0, 0.0], "{backend:?}: a step");
        let stepped = train(Clip::value(0.5).non_finite(NonFinite::Propagate), &bad)?;
        assert_eq!(
            (stepped[0], stepped[2]),
            (-0.5, -0.5),
            "{backend:?}: a step"
        );
        assert!(stepped[1].is_nan(), "{backend:?}: a NaN is not the bound");
    }
    Ok(())
}
