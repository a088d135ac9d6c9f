//! Loss scaling: exact where nothing overflows, PyTorch's rules where something does, and training
//! in half precision.

use std::fs;

use support::device::on_every_backend;
use support::gradients::{
    bits_of_vars, loss_with_gradients, store_for, tensor, tensors_of, values, vars_of,
};

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::{AdamW, ParamGroup, ParamGroups, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, GradAccumulator, LossScaler, NonFinite};
use candle_nn::{Optimizer, ParamsAdamW};
use serde_json::{Value, json};
use support::checkpoints::{Folder, edited};

const SHAPES: [&[usize]; 4] = [&[40, 30], &[7], &[], &[1025]];

/// Weights and reports of a run; of half the steps the caller has the gradients.
fn run<O: Optimizer + 'static>(
    make: impl Fn(Vec<Var>) -> candle_core::Result<O>,
    dtype: DType,
    clip: &Clip,
    groups: Option<&ParamGroups>,
    scaler: Option<LossScaler>,
) -> Result<(Vec<Vec<u64>>, Vec<String>)> {
    let vars = vars_of(&tensors_of(&SHAPES, 700, &[dtype])?)?;
    let opt = ClippedOptimizer::wrap(make(vars.clone())?, vars.clone(), clip.clone())?;
    let mut opt = opt.with_param_norms(true);
    if let Some(groups) = groups {
        opt = opt.with_param_groups(groups.clone())?;
    }
    if let Some(scaler) = scaler {
        opt = opt.with_loss_scaler(scaler)?;
    }
    let mut reports = Vec::new();
    for step in 0..12 {
        let gain = [1.0, 1e-3, 30.0][step as usize % 3];
        let gradients = tensors_of(&SHAPES, 100 * (step + 50), &[dtype])?
            .into_iter()
            .map(|t| t * gain);
        let gradients: Vec<Tensor> = gradients.collect::<candle_core::Result<_>>()?;
        let loss = loss_with_gradients(&vars, &gradients)?;
        let report = if step % 2 == 0 {
            opt.backward_step_report(&loss)?
        } else {
            let grads = opt.scale_loss(&loss)?.backward()?;
            opt.step_report(&grads)?
        };
        let r = report.record()?;
        reports.push(format!(
            "{:?}",
            (
                (r.total_norm, r.clipped_norm, r.clip_coef, r.was_clipped),
                (
                    r.num_clipped,
                    r.skipped,
                    r.non_finite,
                    &r.groups,
                    &r.param_norms
                ),
            )
        ));
    }
    Ok((bits_of_vars(&vars)?, reports))
}

/// Unscaling by a power of two is exact, also while the scale grows.
#[test]
fn a_run_with_a_scaler_is_the_run_without_to_the_bit() -> Result<()> {
    on_every_backend(|| {
        let params = ParamsAdamW {
            lr: 0.01,
            weight_decay: 0.1,
            ..ParamsAdamW::default()
        };
        let momentum = ParamsSgd {
            lr: 0.01,
            momentum: 0.9,
            ..ParamsSgd::default()
        };
        let groups = ParamGroups::new(vec![ParamGroup::new("first", &["var.0"]).max_norm(0.125)])?;
        for (clip, groups) in [
            (Clip::norm(1.0), None),
            (Clip::norm(1e6), None),
            (Clip::none(), None),
            (Clip::value(0.4), None),
            (Clip::norm(1.0).non_finite(NonFinite::Zero), None),
            (Clip::norm(1.0), Some(&groups)),
        ] {
            let scaler = || Some(LossScaler::default().growth_interval(5));
            macro_rules! same {
                ($dtype:expr, $make:expr) => {
                    let without = run($make, $dtype, &clip, groups, None)?;
                    let with = run($make, $dtype, &clip, groups, scaler())?;
                    assert_eq!(with.1, without.1, "{clip} {:?}", $dtype);
                    assert!(with.0 == without.0, "{clip} {:?}: other weights", $dtype);
                };
            }
            same!(DType::F32, |vars| AdamW::new(vars, params.clone()));
            same!(DType::F32, |vars| Sgd::new(vars, momentum));
            same!(DType::F32, |vars| candle_nn::SGD::new(vars, 0.01));
            same!(DType::F64, |vars| AdamW::new(vars, params.clone()));
            same!(DType::BF16, |vars| Ok(
                AdamW::new(vars, params.clone())?.master_weights(true)
            ));
        }
        Ok(())
    })
}

/// A Var of two elements, its optimizer, and stores with a good and a bad gradient.
fn two(clip: Clip, scaler: LossScaler) -> Result<(ClippedOptimizer<AdamW>, [GradStore; 2], Var)> {
    let w = Var::from_tensor(&tensor(&[1.0, 2.0], 2, DType::F32)?)?;
    let vars = vec![("w".to_string(), w.clone())];
    let opt = AdamW::from_named_vars(vars.clone(), ParamsAdamW::default())?;
    let opt = ClippedOptimizer::wrap(opt, vars, clip)?.with_loss_scaler(scaler)?;
    let store = |x: [f64; 2]| -> Result<GradStore> {
        Ok(store_for(
            std::slice::from_ref(&w),
            &[tensor(&x, 2, DType::F32)?],
        ))
    };
    let stores = [store([3.0, 4.0])?, store([3.0, f64::INFINITY])?];
    Ok((opt, stores, w))
}

/// What `torch.amp.GradScaler(init_scale=8, growth_interval=3)` does, by hand.
#[test]
fn the_scale_follows_grad_scalers_rules() -> Result<()> {
    on_every_backend(|| {
        let scaler = LossScaler::default().init_scale(8.0).growth_interval(3);
        let (mut opt, [good, bad], _) = two(Clip::none(), scaler)?;
        let mut seen = Vec::new();
        for step in "..x...x....x..".chars() {
            let report = opt.step_report(if step == 'x' { &bad } else { &good })?;
            assert_eq!(report.skipped()?, step == 'x');
            let scaler = opt.loss_scaler().unwrap();
            seen.push((scaler.current_scale() as u32, scaler.good_steps()));
        }
        let right = [
            (8, 1),
            (8, 2),
            (4, 0),
            (4, 1),
            (4, 2),
            (8, 0),
            (4, 0),
            (4, 1),
            (4, 2),
            (8, 0),
            (8, 1),
            (4, 0),
            (4, 1),
            (4, 2),
        ];
        assert_eq!(seen, right);
        Ok(())
    })
}

#[test]
fn a_scaler_that_is_not_enabled_does_nothing() -> Result<()> {
    let scaler = LossScaler::default().enabled(false);
    let (mut opt, [good, bad], w) = two(Clip::none(), scaler)?;
    let report = opt.step_report(&good)?;
    assert_eq!(report.total_norm()?, 5.0);
    assert!(opt.step_report(&bad)?.skipped()?);
    let loss = w.sum_all()?;
    assert_eq!(values(&opt.scale_loss(&loss)?)?, values(&loss)?);
    assert_eq!(opt.loss_scaler().unwrap().current_scale(), 1.0);
    Ok(())
}

/// Above a scale of 1 skips are the search for it; below, they count.
#[test]
fn only_skips_at_a_scale_of_one_or_below_count() -> Result<()> {
    let scaler = || LossScaler::default().init_scale(8.0);
    let search = |clip: Clip| -> Result<_> {
        let (mut opt, [good, bad], w) = two(clip, scaler())?;
        opt.step_report(&good)?;
        let before = bits_of_vars(std::slice::from_ref(&w))?;
        for _ in 0..3 {
            assert!(opt.step_report(&bad)?.skipped()?);
        }
        assert_eq!(bits_of_vars(std::slice::from_ref(&w))?, before);
        assert_eq!(opt.loss_scaler().unwrap().current_scale(), 1.0);
        Ok((opt, bad, w))
    };
    let (mut opt, bad, _) = search(Clip::norm(1.0).max_skips(1))?;
    assert!(opt.step_report(&bad)?.skipped()?);
    let error = opt.step_report(&bad).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooManySkips {
                skips: 2,
                max_skips: 1,
                ..
            }
        ),
        "{error}"
    );

    let (mut opt, bad, _) = search(Clip::norm(1.0).non_finite(NonFinite::Error))?;
    let error = opt.step_report(&bad).unwrap_err();
    assert!(matches!(error, Error::NonFinite { .. }), "{error}");

    let (mut opt, bad, w) = search(Clip::norm(1.0).non_finite(NonFinite::Zero))?;
    let before = values(&w)?;
    assert!(!opt.step_report(&bad)?.skipped()?);
    assert!(values(&w)?[0] < before[0], "the finite element is used");
    assert_eq!(opt.loss_scaler().unwrap().current_scale(), 1.0);
    Ok(())
}

#[test]
fn fields_outside_their_range_are_refused() -> Result<()> {
    let default = LossScaler::default;
    for (name, scaler) in [
        ("init_scale", default().init_scale(3.0)),
        ("init_scale", default().init_scale(0.0)),
        ("init_scale", default().init_scale(-2.0)),
        ("init_scale", default().init_scale(f64::INFINITY)),
        ("init_scale", default().init_scale(f64::NAN)),
        ("growth_factor", default().growth_factor(0.5)),
        ("growth_factor", default().growth_factor(1.5)),
        ("backoff_factor", default().backoff_factor(1.0)),
        ("growth_interval", default().growth_interval(0)),
    ] {
        let error = two(Clip::none(), scaler).map(drop).unwrap_err();
        let error = error.downcast::<Error>()?;
        assert!(
            matches!(error, Error::InvalidOption { name: field, .. } if field == name),
            "{name}: {error}"
        );
    }
    Ok(())
}

/// An overflow in one micro-batch skips the step of all, and backs off.
#[test]
fn accumulated_gradients_are_unscaled_once() -> Result<()> {
    on_every_backend(|| {
        let scaler = LossScaler::default().init_scale(1024.0);
        let (mut opt, [_, bad], w) = two(Clip::norm(1.0), scaler)?;
        let mut accumulator = GradAccumulator::mean(vec![w.clone()]);
        let half = (w.sqr()?.sum_all()? / 2.0)?; // the gradient is (1, 2)
        for _ in 0..3 {
            accumulator.add(&opt.scale_loss(&half)?.backward()?)?;
        }
        let report = opt.step_report(accumulator.take_grads()?.unwrap())?;
        assert!((report.total_norm()? - 5f64.sqrt()).abs() < 1e-6);
        accumulator.add(&opt.scale_loss(&half)?.backward()?)?;
        accumulator.add(&bad)?;
        assert!(
            opt.step_report(accumulator.take_grads()?.unwrap())?
                .skipped()?
        );
        assert_eq!(opt.loss_scaler().unwrap().current_scale(), 512.0);
        Ok(())
    })
}

#[test]
fn checkpoints_hold_the_scaler() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("optimizer");
    let scaler = || LossScaler::default().init_scale(8.0).growth_interval(3);
    let (mut opt, [good, bad], _) = two(Clip::norm(1.0), scaler())?;
    for store in [&good, &bad, &good, &good] {
        opt.step_report(store)?;
    }
    opt.save(&path)?;
    let saved = opt.loss_scaler().cloned();

    let (mut resumed, ..) = two(Clip::none(), LossScaler::default())?;
    resumed.load(&path)?;
    assert_eq!(resumed.loss_scaler().cloned(), saved);
    resumed.step_report(&good)?;
    assert_eq!(resumed.loss_scaler().unwrap().current_scale(), 8.0);

    // A file of before there was a scaler, or of a run without one: what is here stays.
    let bytes = fs::read(&path)?;
    let without = edited(&bytes, |_, document| {
        let wrapper = document["wrapper"].as_object_mut().unwrap();
        wrapper.remove("loss_scaler").unwrap();
    })?;
    fs::write(&path, without)?;
    let (mut resumed, ..) = two(Clip::none(), scaler())?;
    resumed.load(&path)?;
    assert_eq!(resumed.loss_scaler(), Some(&scaler()));

    let hostile: [(&str, &str, Value); 5] = [
        ("init_scale is 3", "scale", json!(3.0)),
        ("backoff_factor is 2", "backoff_factor", json!(2.0)),
        ("growth_interval is 0", "growth_interval", json!(0)),
        ("good_steps is 9", "good_steps", json!(9)),
        ("unknown field", "no_such_field", json!(1)),
    ];
    for (says, field, value) in hostile {
        let bad = edited(&bytes, |_, document| {
            document["wrapper"]["loss_scaler"][field] = value;
        })?;
        fs::write(&path, bad)?;
        let (mut opt, ..) = two(Clip::none(), scaler())?;
        let error = opt.load(&path).unwrap_err();
        assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(opt.loss_scaler(), Some(&scaler()), "nothing was changed");
    }
    Ok(())
}

/// An accumulator that leaves out non-finite elements would keep the overflow from the scaler.
#[test]
fn sums_that_hide_an_overflow_are_refused() -> Result<()> {
    on_every_backend(|| {
        for policy in [NonFinite::SkipStep, NonFinite::Zero] {
            for enabled in [true, false] {
                let scaler = LossScaler::default().init_scale(8.0).enabled(enabled);
                let (mut opt, [good, bad], w) = two(Clip::norm(1.0), scaler)?;
                let mut accumulator = GradAccumulator::mean(vec![w.clone()]).non_finite(policy);
                accumulator.add(&good)?;
                accumulator.add(&bad)?;
                let before = bits_of_vars(std::slice::from_ref(&w))?;
                let result = opt.step_report(accumulator.take_grads()?.unwrap());
                if enabled {
                    let error = result.unwrap_err();
                    assert!(matches!(error, Error::HiddenOverflow), "{error}");
                    assert_eq!(bits_of_vars(std::slice::from_ref(&w))?, before);
                    assert_eq!(opt.loss_scaler().unwrap().current_scale(), 8.0);
                    opt.step_report(&good)?; // training can go on
                } else {
                    assert!(!result?.skipped()?);
                }
                assert_eq!(opt.last_report().unwrap().step(), 1);
            }
        }
        Ok(())
    })
}

/// Steps that a rule refuses say nothing of the scale: it does not fall, and they are steps without
/// an overflow.
#[test]
fn a_rule_that_skips_does_not_lower_the_scale() -> Result<()> {
    on_every_backend(|| {
        let scaler = LossScaler::default().init_scale(2.0).growth_interval(100);
        let (mut opt, [good, _], w) = two(Clip::skip_above_norm(1.0).max_skips(50), scaler)?;
        let before = bits_of_vars(std::slice::from_ref(&w))?;
        for step in 1..=20 {
            assert!(opt.step_report(&good)?.skipped()?, "the norm is 2.5");
            let scaler = opt.loss_scaler().unwrap();
            assert_eq!((scaler.current_scale(), scaler.good_steps()), (2.0, step));
        }
        assert_eq!(bits_of_vars(std::slice::from_ref(&w))?, before);
        assert_eq!(opt.steps_taken()?, 0);
        Ok(())
    })
}
