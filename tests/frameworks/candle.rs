//! candle-nn 0.11's own tests of its optimizers (`candle-nn/tests/optim.rs`, rewritten) with their
//! expected values: bare, through wrappers whose clip never acts, and with our optimizers in the
//! place of candle's. All runs end with the same values, to the bit.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::{Init, Linear, Module, Optimizer, ParamsAdamW, SGD, VarMap};
use support::device::{device, on_every_backend};
use support::gradients::all_values_of_vars;
use support::oracle::assert_all_close;

/// Clips that never act on these gradients.
fn idle() -> [Clip; 4] {
    [
        Clip::none(),
        Clip::norm(1e30),
        Clip::norm(f64::INFINITY),
        Clip::value(1e30),
    ]
}

/// A step for a loss.
type Step = Box<dyn FnMut(&Tensor) -> candle_core::Result<()>>;

/// The two ways to take a step.
fn steps(mut opt: impl Optimizer + 'static, backward_step: bool) -> Step {
    if backward_step {
        return Box::new(move |loss| opt.backward_step(loss));
    }
    Box::new(move |loss| opt.step(&loss.backward()?))
}

/// On CPU to the bit; GPUs sum in another order.
fn assert_trained(trained: &[f64], right: &[f64]) {
    if device().is_cpu() {
        assert_eq!(trained, right);
    } else {
        assert_all_close(trained, right, 1e-5, "trained");
    }
}

/// Runs a test of candle's, which returns the trained values, with every optimizer.
fn with_every<A: Optimizer + 'static, B: Optimizer + 'static>(
    theirs: impl Fn(Vec<Var>) -> candle_core::Result<A>,
    ours: impl Fn(Vec<Var>) -> candle_core::Result<B>,
    case: impl Fn(&dyn Fn(Vec<Var>) -> Result<Step>) -> Result<Vec<f64>>,
) -> Result<()> {
    let right = case(&|vars| Ok(steps(theirs(vars)?, true)))?;
    on_every_backend(|| {
        let bare = case(&|vars| Ok(steps(ours(vars)?, true)))?;
        assert_eq!(bare, right, "ours");
        for (i, clip) in idle().into_iter().enumerate() {
            let wrapped = case(&|vars| {
                let opt = ClippedOptimizer::wrap(theirs(vars.clone())?, vars, clip.clone())?;
                Ok(steps(opt, i % 2 == 0))
            })?;
            assert_eq!(wrapped, right, "candle's, {clip}");
            let wrapped = case(&|vars| {
                let opt = ClippedOptimizer::wrap(ours(vars.clone())?, vars, clip.clone())?;
                Ok(steps(opt, i % 2 == 0))
            })?;
            assert_eq!(wrapped, right, "ours, {clip}");
        }
        Ok(())
    })
}

#[test]
fn sgd_optim() -> Result<()> {
    let sgd = |vars| SGD::new(vars, 0.1);
    with_every(
        sgd,
        |vars| Sgd::new_lr(vars, 0.1),
        |make| {
            let x = Var::new(0f32, device())?;
            let mut step = make(vec![x.clone()])?;
            for _ in 0..100 {
                let error = (x.as_tensor() - 4.2)?;
                step(&(&error * &error)?)?;
            }
            let trained = all_values_of_vars(&[x])?;
            assert_trained(&trained, &[4.199_999f32.into()]);
            Ok(trained)
        },
    )
}

/// `y = 3 x1 + x2 - 2` for a few `x`.
fn samples() -> candle_core::Result<(Tensor, Tensor)> {
    let layer = Linear::new(
        Tensor::new(&[[3f32, 1.]], device())?,
        Some(Tensor::new(-2f32, device())?),
    );
    let xs = Tensor::new(&[[2f32, 1.], [7., 4.], [-4., 12.], [5., 8.]], device())?;
    let ys = layer.forward(&xs)?;
    Ok((xs, ys))
}

/// So many steps of a regression from zeros.
fn regression(steps: usize, w: &Tensor, b: &Tensor, mut step: Step) -> Result<()> {
    let (xs, ys) = samples()?;
    let layer = Linear::new(w.clone(), Some(b.clone()));
    for _ in 0..steps {
        step(&layer.forward(&xs)?.sub(&ys)?.sqr()?.sum_all()?)?;
    }
    Ok(())
}

#[test]
fn sgd_linear_regression() -> Result<()> {
    let sgd = |vars| SGD::new(vars, 0.004);
    with_every(
        sgd,
        |vars| Sgd::new_lr(vars, 0.004),
        |make| {
            let (w, b) = (
                Var::new(&[[0f32, 0.]], device())?,
                Var::new(0f32, device())?,
            );
            regression(1000, &w, &b, make(vec![w.clone(), b.clone()])?)?;
            let trained = all_values_of_vars(&[w, b])?;
            let right = [2.998_319_6f32, 0.997_902_04, -1.979_690_2];
            assert_trained(&trained, &right.map(f64::from));
            Ok(trained)
        },
    )
}

fn params() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.1,
        ..ParamsAdamW::default()
    }
}

/// Rounded to four digits, as candle's test rounds.
fn assert_adamw_regression(trained: &[f64]) {
    let rounded: Vec<f64> = trained.iter().map(|x| (x * 1e4).round() / 1e4).collect();
    assert_eq!(rounded, [2.7257, 0.7097, 0.7873]);
}

#[test]
fn adamw_linear_regression() -> Result<()> {
    let adamw = |vars| candle_nn::AdamW::new(vars, params());
    with_every(
        adamw,
        |vars| AdamW::new(vars, params()),
        |make| {
            let (w, b) = (
                Var::new(&[[0f32, 0.]], device())?,
                Var::new(0f32, device())?,
            );
            regression(100, &w, &b, make(vec![w.clone(), b.clone()])?)?;
            let trained = all_values_of_vars(&[w, b])?;
            assert_adamw_regression(&trained);
            Ok(trained)
        },
    )
}

#[test]
fn adamw_linear_regression_varmap() -> Result<()> {
    let adamw = |vars| candle_nn::AdamW::new(vars, params());
    with_every(
        adamw,
        |vars| AdamW::new(vars, params()),
        |make| {
            let mut map = VarMap::new();
            let w = map.get((1, 2), "w", Init::Const(0.), DType::F32, device())?;
            let b = map.get((), "b", Init::Const(0.), DType::F32, device())?;
            regression(100, &w, &b, make(map.all_vars())?)?;
            let vars = [Var::from_tensor(&w)?, Var::from_tensor(&b)?];
            let trained = all_values_of_vars(&vars)?;
            assert_adamw_regression(&trained);
            map.set_one("w", Tensor::zeros((1, 2), DType::F32, device())?)?;
            map.set_one("b", Tensor::ones((), DType::F32, device())?)?;
            assert_eq!(all_values_of_vars(&vars)?, [0., 0., 1.]);
            Ok(trained)
        },
    )
}
