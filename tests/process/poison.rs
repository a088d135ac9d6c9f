//! An attack of the soak: poisoned gradients.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, NonFinite};
use candle_nn::{Optimizer, ParamsAdamW, SGD};
use fastrand::Rng;
use support::gradients::{FLOATS, all_values_of_vars, bits_of_vars, host_tensor, store_for};

/// Rules that bound every step, and rules that let the first ones pass or bound other things.
const BOUND: [&str; 7] = [
    "norm:1",
    "norm:0.001",
    "value:0.1",
    "param-norm:0.5",
    "block-rms:0.1",
    "agc",
    "norm:1,norm_type=inf",
];
const OTHER: [&str; 10] = [
    "none",
    "auto",
    "auto:50",
    "quantile",
    "zclip",
    "zclip:warmup=2",
    "adagc",
    "stabilizer",
    "skip:z=3",
    "skip:norm=5",
];

fn random_vars(rng: &mut Rng, dtype: DType) -> Result<Vec<(String, Var)>> {
    let var = |at: usize, rng: &mut Rng| -> Result<(String, Var)> {
        let side = if rng.u8(0..10) == 0 { 200 } else { 6 };
        let rank = rng.usize(1..3);
        let shape: Vec<usize> = (0..rank).map(|_| rng.usize(1..=side)).collect();
        let values: Vec<f64> = normal(rng, shape.iter().product());
        let tensor = host_tensor(&values, shape, dtype)?;
        Ok((format!("w{at}"), Var::from_tensor(&tensor)?))
    };
    (0..rng.usize(1..5)).map(|at| var(at, rng)).collect()
}

pub(crate) fn normal(rng: &mut Rng, n: usize) -> Vec<f64> {
    let mut one = || {
        let radius = (-2.0 * rng.f64().max(f64::MIN_POSITIVE).ln()).sqrt();
        radius * (std::f64::consts::TAU * rng.f64()).cos()
    };
    (0..n).map(|_| one()).collect()
}

/// The largest finite value, and one that is subnormal.
fn extremes(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F16 => (65504.0, 6e-8),
        DType::BF16 => (3.38e38, 1e-40),
        DType::F32 => (f64::from(f32::MAX), 1e-44),
        _ => (f64::MAX, 5e-324),
    }
}

/// What was done to the gradients of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Poison {
    None,
    /// Zero or subnormal.
    Small,
    /// Finite, and near the largest.
    Huge,
    NonFinite,
}

fn random_gradients(rng: &mut Rng, vars: &[Var], dtype: DType) -> Result<(Vec<Tensor>, Poison)> {
    let (largest, smallest) = extremes(dtype);
    let target = rng.usize(0..vars.len());
    let (poison, value) = match rng.u8(0..16) {
        0 => (Poison::NonFinite, f64::NAN),
        1 => (Poison::NonFinite, f64::INFINITY),
        2 => (Poison::NonFinite, f64::NEG_INFINITY),
        3 => (Poison::Huge, 0.9 * largest),
        4 => (Poison::Huge, -0.9 * largest),
        5 => (Poison::Small, smallest),
        6 => (Poison::Small, 0.0),
        _ => (Poison::None, 0.0),
    };
    let everywhere = rng.bool();
    let gradient = |(at, var): (usize, &Var)| {
        let mut values = normal(rng, var.elem_count());
        if at == target && poison != Poison::None {
            let n = values.len();
            if everywhere {
                values.fill(value);
            } else {
                values[rng.usize(0..n)] = value;
            }
        }
        host_tensor(&values, var.shape(), dtype)
    };
    let gradients = vars.iter().enumerate().map(gradient);
    Ok((gradients.collect::<candle_core::Result<_>>()?, poison))
}

/// Random Vars, a random rule, a random optimizer: no panic, weights that stay finite, and skipped
/// steps that change no bit.
pub(crate) fn poison(rng: &mut Rng) -> Result<usize> {
    let dtype = FLOATS[rng.usize(0..4)];
    let named = random_vars(rng, dtype)?;
    let vars: Vec<Var> = named.iter().map(|(_, var)| var.clone()).collect();
    let is_bound = rng.bool();
    let rules = if is_bound { &BOUND[..] } else { &OTHER };
    let rule = rules[rng.usize(0..rules.len())];
    let clip: Clip = rule.parse().with_context(|| rule.to_owned())?;
    let clip = clip.non_finite(NonFinite::SkipStep).max_skips(u32::MAX);
    let sgd = ParamsSgd {
        lr: 0.01,
        momentum: if rng.bool() { 0.9 } else { 0.0 },
        ..ParamsSgd::default()
    };
    let adamw = ParamsAdamW {
        lr: 0.01,
        ..ParamsAdamW::default()
    };
    let mut attack = Poisoned {
        rng,
        vars: &vars,
        dtype,
        is_bound,
    };
    match attack.rng.u8(0..4) {
        0 => attack.run(ClippedOptimizer::wrap(
            AdamW::from_named_vars(named.clone(), adamw)?,
            named,
            clip,
        )?),
        1 => attack.run(ClippedOptimizer::wrap(
            Sgd::from_named_vars(named.clone(), sgd)?,
            named,
            clip,
        )?),
        2 => attack.run(ClippedOptimizer::wrap(
            SGD::new(vars.clone(), 0.01)?,
            named,
            clip,
        )?),
        // In f16 its eps is 0.
        _ if dtype == DType::F16 => Ok(0),
        _ => attack.run(ClippedOptimizer::wrap(
            candle_nn::AdamW::new(vars.clone(), adamw)?,
            named,
            clip,
        )?),
    }
    .with_context(|| format!("{rule}, {dtype:?}"))
}

struct Poisoned<'a> {
    rng: &'a mut Rng,
    vars: &'a [Var],
    dtype: DType,
    is_bound: bool,
}

impl Poisoned<'_> {
    fn run<O: Optimizer + 'static>(&mut self, mut opt: ClippedOptimizer<O>) -> Result<usize> {
        let mut found = 0;
        for step in 0..self.rng.usize(5..40) {
            let (gradients, poison) = random_gradients(self.rng, self.vars, self.dtype)?;
            if poison == Poison::Huge && !self.is_bound {
                continue; // nothing promises that weights stay finite
            }
            found += usize::from(poison != Poison::None);
            let before = bits_of_vars(self.vars)?;
            let report = opt.step_report(&store_for(self.vars, &gradients));
            let is_same = bits_of_vars(self.vars)? == before;
            let at = || format!("step {step}, {poison:?}");
            match report {
                Ok(report) => {
                    let skipped = report.skipped()?;
                    ensure!(!skipped || is_same, "{}: skipped, but not the same", at());
                    ensure!(skipped || poison != Poison::NonFinite, "{}: taken", at());
                }
                Err(error) => {
                    ensure!(is_same, "{}: {error}, but not the same", at());
                    // A rule may refuse too many steps in a row.
                    ensure!(!self.is_bound, "{}: {error}", at());
                }
            }
            let weights = all_values_of_vars(self.vars)?;
            ensure!(
                weights.iter().all(|weight| weight.is_finite()),
                "{}: weights are not finite",
                at()
            );
        }
        Ok(found)
    }
}
