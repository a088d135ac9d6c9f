//! Events: debug for every step, one warning for missing Vars, a warning for every skip.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::{Init, Optimizer, SGD, VarBuilder, VarMap};
use support::events::{events, of_level};
use support::gradients::{store_for, store_of, tensor};
use support::optimizers::Recorder;
use tracing::Level;

/// Two Vars with gradients, and their optimizer.
fn optimizer(clip: Clip) -> Result<(ClippedOptimizer<Recorder>, Vec<Var>, Vec<Tensor>)> {
    let gradients = vec![
        tensor(&[3.0, 4.0], 2, DType::F32)?,
        tensor(&[0.0, 12.0], 2, DType::F32)?,
    ];
    let (vars, _) = store_of(&gradients)?;
    let inner = Recorder::new(vars.clone(), false)?;
    Ok((
        ClippedOptimizer::wrap(inner, vars.clone(), clip)?,
        vars,
        gradients,
    ))
}

#[test]
fn every_step_is_a_debug_event_with_its_numbers() -> Result<()> {
    let (mut opt, vars, gradients) = optimizer(Clip::norm(6.5).eps(0.0))?;
    let events = events(|| {
        for _ in 0..3 {
            opt.step(&store_for(&vars, &gradients))?;
        }
        Ok(())
    })?;
    assert!(of_level(&events, Level::WARN).is_empty(), "{events:?}");
    let steps = of_level(&events, Level::DEBUG);
    assert_eq!(steps.len(), 3);
    for (fields, step) in steps.into_iter().zip(1..) {
        assert_eq!(fields.0["step"], step.to_string());
        assert_eq!(fields.0["total_norm"], "13.0");
        assert_eq!(fields.0["clipped_norm"], "6.5");
        assert_eq!(fields.0["clip_coef"], "0.5");
        assert_eq!(fields.0["skipped"], "false");
    }
    Ok(())
}

#[test]
fn missing_vars_are_warned_of_once() -> Result<()> {
    let (mut opt, vars, gradients) = optimizer(Clip::none())?;
    let all = store_for(&vars, &gradients);
    let one = store_for(&vars[..1], &gradients[..1]);
    let events = events(|| {
        opt.step(&all)?;
        opt.step(&one)?;
        opt.step(&one)?;
        opt.step(&all)?;
        opt.step(&one)?;
        Ok(())
    })?;
    let warnings = of_level(&events, Level::WARN);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0].0["missing"], "[\"var.1\"]");
    assert_eq!(warnings[0].0["of"], "2");
    assert!(warnings[0].0["message"].contains("RmsNorm::forward"));
    Ok(())
}

#[test]
fn expected_missing_vars_are_not_warned_of() -> Result<()> {
    let (opt, vars, gradients) = optimizer(Clip::none())?;
    let mut opt = opt.ignore_missing_grads(&["var.1"]);
    let events = events(|| Ok(opt.step(&store_for(&vars[..1], &gradients[..1]))?))?;
    assert!(of_level(&events, Level::WARN).is_empty(), "{events:?}");
    Ok(())
}

#[test]
fn every_skip_is_warned_of_with_the_var() -> Result<()> {
    let (mut opt, vars, mut gradients) = optimizer(Clip::norm(1.0))?;
    gradients[1] = tensor(&[f64::NAN, f64::INFINITY], 2, DType::F32)?;
    let events = events(|| {
        for _ in 0..2 {
            opt.step(&store_for(&vars, &gradients))?;
        }
        Ok(())
    })?;
    let warnings = of_level(&events, Level::WARN);
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    for (fields, step) in warnings.into_iter().zip(1..) {
        assert_eq!(fields.0["step"], step.to_string());
        assert!(fields.0["var"].contains("var.1"));
        assert_eq!(fields.0["non_finite"], "2");
        assert_eq!(
            fields.0["message"],
            "step skipped: gradients are not finite"
        );
    }
    let steps = of_level(&events, Level::DEBUG);
    assert_eq!(steps.len(), 2, "a skipped step is a step");
    assert_eq!(steps[0].0["skipped"], "true");
    Ok(())
}

#[test]
fn a_row_of_tiny_coefficients_is_one_warning() -> Result<()> {
    let (mut opt, vars, gradients) = optimizer(Clip::norm(1e-6))?; // the norm is 13
    let events = events(|| {
        for _ in 0..25 {
            opt.step(&store_for(&vars, &gradients))?;
        }
        opt.set_clip(Clip::norm(1.0))?;
        opt.step(&store_for(&vars, &gradients))?;
        opt.set_clip(Clip::value(1e-9))?; // has no coefficient
        opt.step(&store_for(&vars, &gradients))?;
        opt.set_clip(Clip::param_norm(1e-6))?;
        for _ in 0..12 {
            opt.step(&store_for(&vars, &gradients))?;
        }
        Ok(())
    })?;
    let warnings = of_level(&events, Level::WARN);
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert_eq!(warnings[0].0["step"], "10");
    assert_eq!(warnings[1].0["step"], "37");
    for fields in warnings {
        let message = &fields.0["message"];
        assert!(
            message.contains("next to nothing of the gradients"),
            "{message}"
        );
    }
    Ok(())
}

#[test]
fn a_var_that_the_wrapper_was_not_given_is_warned_of_once() -> Result<()> {
    let known = Var::new(&[3f64, 4.0], &Device::Cpu)?;
    let unknown = Var::new(&[[1f64, 2.0]], &Device::Cpu)?;
    let constant = Tensor::new(&[5f64, 6.0], &Device::Cpu)?;
    let loss = (known.as_tensor() * &constant)?.sum_all()?;
    let both = (&loss + unknown.sum_all()?)?;
    let sgd = || SGD::new(vec![known.clone(), unknown.clone()], 0.1);
    let mut opt = ClippedOptimizer::wrap(sgd()?, vec![known.clone()], Clip::norm(1.0))?;
    let events = events(|| {
        opt.backward_step(&loss)?; // a constant has a gradient, too
        for _ in 0..3 {
            opt.backward_step(&both)?;
        }
        Ok(())
    })?;
    let warnings = of_level(&events, Level::WARN);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0].0["unknown"], "1");
    assert_eq!(warnings[0].0["shapes"], "[[1, 2]]");
    Ok(())
}

#[test]
fn a_var_map_that_has_grown_is_warned_of_once_with_the_new_names() -> Result<()> {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let w = vb.get_with_hints(2, "w", Init::Const(1.0))?;
    let mut fused =
        ClippedOptimizer::wrap(Sgd::from_named_vars(&map, 0.1)?, &map, Clip::norm(1.0))?;
    let mut other = ClippedOptimizer::wrap(SGD::new(map.all_vars(), 0.1)?, &map, Clip::norm(1.0))?;
    let loss = w.sum_all()?;
    let before = events(|| {
        fused.backward_step(&loss)?;
        Ok(other.backward_step(&loss)?)
    })?;
    assert!(of_level(&before, Level::WARN).is_empty(), "{before:?}");
    vb.get_with_hints(3, "new", Init::Const(1.0))?;
    vb.get_with_hints(3, "more", Init::Const(1.0))?;
    {
        // A step must not wait for a map that its own thread holds.
        let data = map.data().lock().unwrap();
        let events = events(|| Ok(fused.backward_step(&loss)?))?;
        assert!(of_level(&events, Level::WARN).is_empty(), "{events:?}");
        drop(data);
    }
    let steps: [&mut dyn FnMut() -> candle_core::Result<()>; 2] =
        [&mut || fused.backward_step(&loss), &mut || {
            other.backward_step(&loss)
        }];
    for step in steps {
        let events = events(|| Ok((0..3).try_for_each(|_| step())?))?;
        let warnings = of_level(&events, Level::WARN);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert_eq!(warnings[0].0["new"], "[\"more\", \"new\"]");
    }
    Ok(())
}

#[test]
fn vars_that_a_fused_optimizer_does_not_train_are_told() -> Result<()> {
    let (head, body) = (Var::new(1f32, &Device::Cpu)?, Var::new(2f32, &Device::Cpu)?);
    let all = vec![
        ("head".to_string(), head.clone()),
        ("body".to_string(), body),
    ];
    let events = events(|| {
        ClippedOptimizer::wrap(Sgd::new_lr(vec![head], 0.1)?, all, Clip::norm(1.0))?;
        Ok(())
    })?;
    let told = of_level(&events, Level::INFO);
    assert_eq!(told.len(), 1, "{events:?}");
    assert_eq!(told[0].0["untrained"], "[\"body\"]");
    Ok(())
}

#[test]
fn halves_around_another_optimizer_are_warned_of_once() -> Result<()> {
    for (dtype, expected) in [(DType::F16, 1), (DType::BF16, 1), (DType::F32, 0)] {
        let vars = vec![
            Var::zeros(2, DType::F32, &Device::Cpu)?,
            Var::zeros(2, dtype, &Device::Cpu)?,
        ];
        let others = events(|| {
            let inner = SGD::new(vars.clone(), 0.1)?;
            let inner = ClippedOptimizer::wrap(inner, vars.clone(), Clip::norm(1.0))?;
            // The wrapper inside has said it.
            let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), Clip::value(1.0))?;
            Ok(opt.backward_step(&vars[1].sum_all()?)?)
        })?;
        let warnings = of_level(&others, Level::WARN);
        let of_halves = warnings
            .iter()
            .filter(|fields| fields.0.contains_key("halves"));
        let of_halves: Vec<_> = of_halves.collect();
        assert_eq!(of_halves.len(), expected, "{dtype:?} {warnings:?}");
        for fields in of_halves {
            assert_eq!(fields.0["first"], "\"var.1\"");
            assert!(fields.0["message"].contains("optim::AdamW"));
        }
        let ours = events(|| {
            ClippedOptimizer::wrap(Sgd::new_lr(vars.clone(), 0.1)?, vars, Clip::norm(1.0))?;
            Ok(())
        })?;
        assert!(of_level(&ours, Level::WARN).is_empty(), "{ours:?}");
    }
    Ok(())
}
