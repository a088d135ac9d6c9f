//! Training loops in the shape of real programs: each adopts the library as a user would, and meets
//! the pitfalls of its kind. All on CPU, where candle's backward passes have the same bits in each
//! run.
#![allow(clippy::unwrap_used)]

mod actor_critic;
mod batch_norm;
mod gan;
mod llama2;
mod lora;
mod mnist;
mod prefixes;
mod tied;

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_grad_clip::NamedVars;
use candle_nn::{VarBuilder, VarMap};
use support::gradients::{all_values, host_tensor, random_values, values};
use support::oracle;
use tracing::field::Field;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// The relative tolerance of a norm: both sides sum the same f32 gradients in f64.
const EXACT: f64 = 1e-12;

fn builder(map: &VarMap) -> VarBuilder<'static> {
    VarBuilder::from_varmap(map, DType::F32, &Device::Cpu)
}

/// Made-up values, the same for the same seed.
fn data(seed: u64, shape: impl Into<Shape>) -> candle_core::Result<Tensor> {
    let shape = shape.into();
    host_tensor(&random_values(shape.elem_count(), seed), shape, DType::F32)
}

/// Gives the model the same weights in each run: candle's initial ones are random. Biases are 0;
/// other vectors stay as their layers made them.
fn start(map: &VarMap) -> Result<()> {
    let vars = NamedVars::from(map);
    for (seed, (name, var)) in (1000..).zip(vars.names().iter().zip(vars.vars())) {
        if name.ends_with("bias") {
            var.set(&var.zeros_like()?)?;
        } else if var.rank() >= 2 {
            let inputs = var.elem_count() / var.dim(0)?;
            let size = (inputs as f64).sqrt().recip();
            var.set(&(data(seed, var.shape())? * size)?)?;
        }
    }
    Ok(())
}

/// The 2-norm of the gradients of these Vars as one vector, of those that have one.
fn norm_by_hand(grads: &GradStore, vars: &[Var]) -> Result<f64> {
    let grads = vars.iter().filter_map(|var| grads.get(var).cloned());
    let grads = grads.collect::<Vec<_>>();
    Ok(oracle::norm(&all_values(&grads)?, 2.0))
}

/// The values of each Var.
fn values_of(vars: &[Var]) -> Result<Vec<Vec<f64>>> {
    let values = vars.iter().map(|var| values(var));
    Ok(values.collect::<candle_core::Result<_>>()?)
}

/// Asserts that each Var moved from `before` by `-rate` times its gradient, to f32's rounding.
fn assert_moved(vars: &[Var], before: &[Vec<f64>], grads: &GradStore, rate: f64) -> Result<()> {
    for (var, before) in vars.iter().zip(before) {
        let grads = values(grads.get(var).unwrap())?;
        for ((after, before), grad) in values(var)?.iter().zip(before).zip(&grads) {
            let right = before - rate * grad;
            let allowed = 3e-7 * (before.abs() + (rate * grad).abs());
            assert!(
                (after - right).abs() <= allowed,
                "{after}, expected {right}"
            );
        }
    }
    Ok(())
}

/// The texts of the warnings of `f`, fields included.
fn warnings(f: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
    let seen = Warnings::default();
    let subscriber = tracing_subscriber::registry().with(seen.clone());
    tracing::subscriber::with_default(subscriber, f)?;
    let texts = seen.0.lock().unwrap().clone();
    Ok(texts)
}

#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl<S: Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() == Level::WARN {
            let mut fields = Vec::new();
            event.record(&mut |field: &Field, value: &dyn Debug| {
                fields.push(format!("{field}={value:?}"));
            });
            self.0.lock().unwrap().push(fields.join(" "));
        }
    }
}

/// The mean of a few numbers.
fn mean(numbers: &[f64]) -> f64 {
    numbers.iter().sum::<f64>() / numbers.len() as f64
}
