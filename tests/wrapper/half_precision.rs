//! Training in half precision with a loss scale: overflows back off, and small gradients survive.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, LossScaler, NonFinite, SkipReason};
use candle_nn::{Optimizer, ParamsAdamW};
use support::device::on_every_backend;
use support::gradients::{
    bits_of_vars, loss_with_gradients, random_values, store_for, tensor, values,
};
use support::net::Net;

/// A net whose weights have this dtype.
fn net(dtype: DType) -> Result<Net> {
    Ok(Net::new(dtype, 4, 32, 0.4)?)
}

/// Squared errors of a function to learn, in the net's dtype.
fn errors(net: &Net) -> Result<Tensor> {
    let x = tensor(
        &random_values(64 * 4, 99),
        (64, 4),
        net.hidden.weight().dtype(),
    )?;
    Ok(net.errors(&x, &x.sin()?.sum_keepdim(1)?)?)
}

/// Trains with a loss of `factor` times the mean in `dtype`: the losses without the factor, and the
/// skipped steps.
fn train(
    net: &Net,
    dtype: DType,
    factor: f64,
    scaler: Option<LossScaler>,
) -> Result<(Vec<f64>, Vec<usize>, f64)> {
    let params = ParamsAdamW {
        lr: 0.01,
        eps: 1e-12,
        weight_decay: 0.0,
        ..ParamsAdamW::default()
    };
    let opt = AdamW::from_named_vars(&net.map, params)?.master_weights(true);
    let mut opt = ClippedOptimizer::wrap(opt, &net.map, Clip::norm(1.0))?;
    if let Some(scaler) = scaler {
        opt = opt.with_loss_scaler(scaler)?;
    }
    let (mut losses, mut skipped) = (Vec::new(), Vec::new());
    for step in 0..150 {
        let loss = errors(net)?.to_dtype(dtype)?.mean_all()?;
        losses.push(values(&loss)?[0]);
        let report = opt.backward_step_report(&(loss * factor)?)?;
        if report.skipped()? {
            skipped.push(step);
        }
    }
    let scale = opt.loss_scaler().map_or(1.0, LossScaler::current_scale);
    Ok((losses, skipped, scale))
}

/// `2^times`: what so many halvings divide by.
fn halved(times: usize) -> f64 {
    (1u64 << times) as f64
}

fn assert_learned(losses: &[f64], what: &str) {
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < first / 20.0, "{what}: {first} -> {last}");
    assert!(losses.iter().all(|loss| loss.is_finite()), "{what}");
}

#[test]
fn half_precision_trains_and_overflow_backs_off() -> Result<()> {
    on_every_backend(|| {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let scaler = Some(LossScaler::default());
            let (losses, skipped, scale) = train(&net(dtype)?, DType::F32, 1.0, scaler)?;
            assert_learned(&losses, &format!("{dtype:?}"));
            // Sums over the batch pass f16's maximum in the first step, and fit at half the scale
            // or less.
            let halvings = skipped.len();
            assert_eq!(scale, 65536.0 / halved(halvings), "{dtype:?}");
            assert!(skipped.iter().copied().eq(0..halvings), "{dtype:?}");
            let most = if dtype == DType::F16 { 3 } else { 0 };
            assert!(halvings <= most, "{dtype:?}: {skipped:?}");
        }
        // In f16 the loss's own gradient is the scale: 2^16 is infinite.
        let scaler = Some(LossScaler::default());
        let (losses, skipped, scale) = train(&net(DType::F16)?, DType::F16, 1.0, scaler)?;
        assert_learned(&losses, "a loss in f16");
        assert_eq!((skipped[0], scale), (0, 65536.0 / halved(skipped.len())));
        // Far too large: every step is skipped until the scale fits, more than `max_skips` of them.
        let scaler = Some(LossScaler::default().init_scale(2f64.powi(40)));
        let (losses, skipped, scale) = train(&net(DType::F16)?, DType::F32, 1.0, scaler)?;
        assert_learned(&losses, "2^40");
        assert!(skipped.len() > 10, "{skipped:?}");
        assert!(skipped.iter().copied().take(11).eq(0..11), "{skipped:?}");
        assert_eq!(scale, halved(40) / halved(skipped.len()));
        Ok(())
    })
}

/// Gradients of 1e-7 and below vanish in f16, unless they are scaled.
#[test]
fn small_gradients_survive_in_f16() -> Result<()> {
    on_every_backend(|| {
        let without = train(&net(DType::F16)?, DType::F32, 1e-7, None)?.0;
        assert_eq!(without[0], without[149], "nothing is learned");
        let scaler = Some(LossScaler::default().init_scale(2f64.powi(36)));
        let with = train(&net(DType::F16)?, DType::F32, 1e-7, scaler)?.0;
        assert_learned(&with, "scaled");
        Ok(())
    })
}

/// The wrapper around an optimizer that gets the gradients in the Var's dtype, at a loss scale of
/// 0.25.
fn quarter<O: Optimizer + 'static>(
    make: impl Fn(Vec<Var>) -> candle_core::Result<O>,
    dtype: DType,
    clip: Clip,
    largest: f64,
) -> Result<(ClippedOptimizer<O>, GradStore, Vec<Var>)> {
    let vars = vec![
        Var::from_tensor(&tensor(&[1.0, 2.0], (1, 2), dtype)?)?,
        Var::from_tensor(&tensor(&[1.0, 2.0], (2, 1), dtype)?)?,
    ];
    let scaler = LossScaler::default().init_scale(0.25);
    let opt = ClippedOptimizer::wrap(make(vars.clone())?, vars.clone(), clip)?;
    let gradients = [
        tensor(&[1.0, 2.0], (1, 2), dtype)?,
        tensor(&[4.0, largest], (2, 1), dtype)?,
    ];
    let store = store_for(&vars, &gradients);
    Ok((opt.with_loss_scaler(scaler)?, store, vars))
}

/// Whether a step at that scale is skipped, and then says so; if not, whether it leaves numbers
/// that are finite.
fn skips<O: Optimizer + 'static>(
    make: impl Fn(Vec<Var>) -> candle_core::Result<O>,
    dtype: DType,
    clip: &Clip,
    largest: f64,
) -> Result<bool> {
    let (mut opt, store, vars) = quarter(&make, dtype, clip.clone().max_skips(1), largest)?;
    let before = bits_of_vars(&vars)?;
    let report = opt.step_report(&store)?;
    let loss = loss_with_gradients(
        &vars,
        &[
            store.get(&vars[0]).unwrap().affine(4.0, 0.0)?,
            store.get(&vars[1]).unwrap().affine(1.0, 0.0)?,
        ],
    )?;
    if report.skipped()? {
        assert_eq!(report.record()?.non_finite, 0);
        assert_eq!(report.record()?.skip_reason, Some(SkipReason::Overflow));
        assert_eq!(bits_of_vars(&vars)?, before);
        assert_eq!(opt.loss_scaler().unwrap().current_scale(), 0.25);
        let error = opt.step_report(&store).unwrap_err();
        assert!(
            matches!(&error, Error::TooManySkips { skips: 2, var: Some(var), .. } if var == "var.1"),
            "{error}"
        );
        let strict = clip.clone().non_finite(NonFinite::Error);
        let (mut opt, store, vars) = quarter(&make, dtype, strict, largest)?;
        let error = opt.step_report(&store).unwrap_err();
        assert!(
            matches!(&error, Error::Overflow { var, coef, .. } if var == "var.1" && *coef > 1.0),
            "{error}"
        );
        assert_eq!(bits_of_vars(&vars)?, before);
        return Ok(true);
    }
    opt.backward_step(&loss)?;
    for var in &vars {
        assert!(
            values(var)?.iter().all(|x| x.is_finite()),
            "{clip} {dtype:?}"
        );
    }
    Ok(false)
}

/// A gradient of 20000 is 80000 without its scale, more than f16 holds.
#[test]
fn a_scale_below_one_makes_nothing_infinite() -> Result<()> {
    on_every_backend(|| {
        let plain = |vars| candle_nn::SGD::new(vars, 1e-4);
        let ours = |vars| Sgd::new(vars, 1e-4.into());
        let (none, norm, value) = (Clip::none(), Clip::norm(1.0), Clip::value(70000.0));
        let agc = Clip::agc();
        assert!(skips(plain, DType::F16, &none, 20000.0)?);
        assert!(skips(plain, DType::F16, &Clip::norm(70000.0), 30000.0)?);
        assert!(skips(plain, DType::F16, &value, 20000.0)?);
        assert!(!skips(plain, DType::F16, &none, 16000.0)?);
        assert!(
            !skips(plain, DType::F16, &norm, 20000.0)?,
            "small once clipped"
        );
        assert!(!skips(plain, DType::F16, &Clip::value(0.5), 20000.0)?);
        assert!(
            !skips(plain, DType::F16, &agc, 20000.0)?,
            "its unit is clipped"
        );
        assert!(!skips(ours, DType::F16, &none, 20000.0)?, "computed in f32");
        assert!(!skips(plain, DType::BF16, &none, 20000.0)?);
        for dtype in [DType::F32, DType::BF16] {
            assert!(skips(plain, dtype, &none, 1e38)?);
            assert!(skips(ours, dtype, &none, 1e38)?);
        }
        assert!(!skips(ours, DType::F64, &none, 1e38)?);
        Ok(())
    })
}
