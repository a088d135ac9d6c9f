//! Events: debug for every step, one warning for missing Vars, a warning for every skip.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::Optimizer;
use support::gradients::{store_for, store_of, tensor};
use support::optimizers::Recorder;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// One event: its level, and its fields as text.
#[derive(Debug, Clone)]
struct Seen {
    level: Level,
    fields: Fields,
}

#[derive(Debug, Clone, Default)]
struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().into(), format!("{value:?}"));
    }
}

#[derive(Debug, Clone, Default)]
struct Collector(Arc<Mutex<Vec<Seen>>>);

impl<S: Subscriber> Layer<S> for Collector {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = *event.metadata().level();
        self.0.lock().unwrap().push(Seen { level, fields });
    }
}

/// The events of `f`.
fn events(f: impl FnOnce() -> Result<()>) -> Result<Vec<Seen>> {
    let collector = Collector::default();
    let subscriber = tracing_subscriber::registry().with(collector.clone());
    tracing::subscriber::with_default(subscriber, f)?;
    let seen = collector.0.lock().unwrap().clone();
    Ok(seen)
}

fn of_level(events: &[Seen], level: Level) -> Vec<&Fields> {
    let of = events.iter().filter(|event| event.level == level);
    of.map(|event| &event.fields).collect()
}

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
    let mut opt = opt.expect_missing(&["var.1"]);
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
