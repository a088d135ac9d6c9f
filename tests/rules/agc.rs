//! `Clip::agc`: cases of optax, and random ones against the equation written out again.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::{Agc, AgcUnits, Clip, ClippedOptimizer, Error, StepReport};
use candle_nn::Optimizer;
use support::device::{backends, device};
use support::gradients::{store_for, tensor, values};
use support::optimizers::Recorder;
use support::oracle::{assert_all_close, assert_close};

pub(super) const UNITS: [AgcUnits; 3] = [AgcUnits::Rows, AgcUnits::Columns, AgcUnits::Optax];
const SHAPES: [&[usize]; 9] = [
    &[],
    &[7],
    &[5, 3],
    &[3, 5],
    &[1, 6],
    &[4, 1],
    &[2, 3, 4],
    &[3, 2, 3, 5],
    &[2, 0],
];

/// A Var and its gradient.
pub(super) type Pair = (Var, Tensor);

pub(super) fn rule(clipping: f64, units: AgcUnits) -> Agc {
    Agc {
        clipping,
        units,
        ..Agc::default()
    }
}

pub(super) fn random(rng: &mut fastrand::Rng, n: usize) -> Vec<f64> {
    let size = 10f64.powf(4.0 * rng.f64() - 3.0);
    let row = 1 + rng.usize(0..4);
    let mut value = |i: usize| {
        // Some parts are larger, and some are zero.
        let part = [1.0, 0.0, 30.0, 0.1][i / row % 4];
        size * part * (rng.f64() - 0.5)
    };
    (0..n).map(&mut value).collect()
}

pub(super) fn random_pairs(seed: u64, dtype: DType) -> Result<Vec<Pair>> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut pair = |shape: &&[usize]| -> Result<Pair> {
        let n = shape.iter().product();
        let weights = tensor(&random(&mut rng, n), *shape, dtype)?;
        Ok((
            Var::from_tensor(&weights)?,
            tensor(&random(&mut rng, n), *shape, dtype)?,
        ))
    };
    SHAPES.iter().map(&mut pair).collect()
}

pub(super) fn named(pairs: &[Pair]) -> Vec<(String, Var)> {
    let name = |(i, (var, _)): (usize, &Pair)| (format!("v{i}"), var.clone());
    pairs.iter().enumerate().map(name).collect()
}

pub(super) fn store(pairs: &[Pair]) -> GradStore {
    let (vars, grads): (Vec<Var>, Vec<Tensor>) = pairs.iter().cloned().unzip();
    store_for(&vars, &grads)
}

/// What an optimizer in the wrapper gets.
pub(super) fn clipped(
    clip: impl Into<Clip>,
    pairs: &[Pair],
) -> Result<(Vec<Vec<f64>>, StepReport)> {
    let named = named(pairs);
    let vars = named.iter().map(|(_, var)| var.clone()).collect();
    let mut opt = ClippedOptimizer::wrap(Recorder::new(vars, true)?, named, clip.into())?;
    let report = opt.step_report(&store(pairs))?;
    let got = opt.inner().steps[0].iter().flatten();
    Ok((got.map(values).collect::<candle_core::Result<_>>()?, report))
}

/// The unit of each element, by its place in every dimension.
fn unit_of_each(shape: &[usize], units: AgcUnits) -> Vec<Vec<usize>> {
    let n: usize = shape.iter().product();
    let above_one = shape.iter().filter(|n| **n > 1).count();
    let of = |mut at: usize| {
        let mut place = Vec::new();
        for length in shape.iter().rev() {
            place.insert(0, at % length);
            at /= length;
        }
        match (units, shape.len()) {
            (_, 0 | 1) => vec![],
            (AgcUnits::Rows, _) => vec![place[0]],
            (AgcUnits::Columns, rank) => vec![place[rank - 1]],
            (_, _) if above_one <= 1 => vec![],
            (_, 2 | 3) => place[1..].to_vec(),
            (_, _) => vec![place[3]],
        }
    };
    (0..n).map(of).collect()
}

/// The equation: the coefficient of each element.
fn formula(weights: &[f64], grads: &[f64], units: &[Vec<usize>], agc: &Agc) -> Vec<f64> {
    let norm = |values: &[f64], unit: &Vec<usize>| {
        let members = values.iter().zip(units).filter(|(_, other)| *other == unit);
        members.map(|(x, _)| x * x).sum::<f64>().sqrt()
    };
    let coef = |unit: &Vec<usize>| {
        let limit = agc.clipping * norm(weights, unit).max(agc.eps);
        let norm = norm(grads, unit);
        if norm > limit { limit / norm } else { 1.0 }
    };
    units.iter().map(coef).collect()
}

fn l2(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn random_cases_agree_with_the_equation() -> Result<()> {
    let mut seen = 0;
    for seed in 0..120 {
        for units in UNITS {
            for backend in backends() {
                let pairs = random_pairs(seed, DType::F64)?;
                let agc = rule([0.01, 0.3, 2.0][seed as usize % 3], units);
                let (mut right, mut num_clipped, mut smallest) = (Vec::new(), 0, 1f64);
                for (var, grad) in &pairs {
                    let grads = values(grad)?;
                    let ids = unit_of_each(var.dims(), units);
                    let coefs = formula(&values(var)?, &grads, &ids, &agc);
                    let below = |(_, coef): &(&Vec<usize>, &f64)| **coef < 1.0;
                    let units = ids.iter().zip(&coefs).filter(below).map(|(id, _)| id);
                    num_clipped += units.collect::<std::collections::BTreeSet<_>>().len() as u64;
                    smallest = coefs.iter().copied().fold(smallest, f64::min);
                    right.push(
                        grads
                            .iter()
                            .zip(&coefs)
                            .map(|(g, c)| g * c)
                            .collect::<Vec<f64>>(),
                    );
                }
                let what = format!("seed {seed}, {units:?}, {backend:?}");
                let (got, report) = backend::with_backend(backend, || clipped(agc, &pairs))?;
                for (got, right) in got.iter().zip(&right) {
                    assert_all_close(got, right, 1e-12, &what);
                }
                assert_close(
                    report.record()?.clipped_norm,
                    l2(&right.concat()),
                    1e-12,
                    &what,
                );
                assert_close(report.clip_coef()?, smallest, 1e-12, &what);
                assert_eq!(report.record()?.num_clipped, num_clipped, "{what}");
                assert_eq!(report.was_clipped()?, num_clipped > 0, "{what}");
                seen += num_clipped;
            }
        }
    }
    assert!(seen > 10_000, "{seen}");
    Ok(())
}

/// optax' `_clipping_test.py`: params ([1, 2], [3, 4]), updates ([500, 5], [300, 3]), clipping 1 /
/// i.
#[test]
fn optax_vectors() -> Result<()> {
    for backend in backends() {
        for round in 1..50 {
            let clipping = 1.0 / f64::from(round);
            let pair = |weights: [f64; 2], grads: [f64; 2]| -> Result<Pair> {
                let grads = Tensor::new(&grads, device())?;
                Ok((Var::new(&weights, device())?, grads))
            };
            let mut pairs = vec![
                pair([1.0, 2.0], [500.0, 5.0])?,
                pair([3.0, 4.0], [300.0, 3.0])?,
            ];
            let (once, _) = backend::with_backend(backend, || {
                clipped(rule(clipping, AgcUnits::Optax), &pairs)
            })?;
            for (got, (var, grad)) in once.iter().zip(&mut pairs) {
                assert_close(l2(got), clipping * l2(&values(var)?), 1e-12, "unit norm");
                *grad = Tensor::new(&got[..], device())?;
            }
            let (twice, _) = backend::with_backend(backend, || {
                clipped(rule(clipping, AgcUnits::Optax), &pairs)
            })?;
            assert_all_close(&twice.concat(), &once.concat(), 1e-12, "clipped again");
        }
    }
    Ok(())
}

/// optax' case of a convolution of rank 5 (its `axis` (0, 1, 2, 3)): params of ones, gradients of
/// twos, clipping 0.5.
#[test]
fn optax_ranks() -> Result<()> {
    let ones = |shape: &[usize]| -> Result<Vec<Pair>> {
        let ones = Tensor::ones(shape, DType::F32, device())?;
        Ok(vec![(Var::from_tensor(&ones)?, (&ones * 2.0)?)])
    };
    for backend in backends() {
        let pairs = ones(&[2, 2, 2, 3, 4])?;
        for units in [AgcUnits::Columns, AgcUnits::Rows] {
            let (got, report) =
                backend::with_backend(backend, || clipped(rule(0.5, units), &pairs))?;
            assert_all_close(&got[0], &[0.5; 96], 1e-6, "clipped");
            let expected = if units == AgcUnits::Rows { 2 } else { 4 };
            assert_eq!(report.record()?.num_clipped, expected);
        }
    }
    for shape in [&[2; 5][..], &[2; 6]] {
        let error = clipped(rule(0.5, AgcUnits::Optax), &ones(shape)?).unwrap_err();
        let error = error.downcast_ref::<Error>();
        assert!(
            matches!(error, Some(Error::AgcRank { var, .. }) if var == "v0"),
            "{error:?}"
        );
    }
    Ok(())
}

#[test]
fn vars_are_left_out_by_name() -> Result<()> {
    let pairs = random_pairs(3, DType::F32)?;
    let (all, _) = clipped(rule(1e-3, AgcUnits::Rows), &pairs)?;
    let excluding = |patterns: &[&str]| Agc {
        exclude: patterns.iter().map(ToString::to_string).collect(),
        ..rule(1e-3, AgcUnits::Rows)
    };
    let (some, report) = clipped(excluding(&["v2", "*6"]), &pairs)?;
    for (index, (_, grad)) in pairs.iter().enumerate() {
        let is_left = [2, 6].contains(&index);
        let expected = if is_left {
            values(grad)?
        } else {
            all[index].clone()
        };
        assert_eq!(some[index], expected, "{index}");
    }
    let norm = l2(&some.concat());
    assert_close(report.record()?.clipped_norm, norm, 1e-6, "norm of all");
    let error = clipped(excluding(&["head.*"]), &pairs)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("pattern `head.*`") && error.contains("`v0`"),
        "{error}"
    );
    // A rank that optax does not know is fine where it is left out.
    let rank6 = Tensor::ones(&[1, 1, 2, 2, 1, 1], DType::F32, device())?;
    let left_out = Agc {
        exclude: vec!["v?".into()],
        units: AgcUnits::Optax,
        ..Agc::default()
    };
    let pair = (Var::from_tensor(&rank6)?, rank6);
    assert!(!clipped(left_out, &[pair])?.1.was_clipped()?);
    Ok(())
}

#[test]
fn other_norms_and_layouts() -> Result<()> {
    // A gradient that is not contiguous, and one that is broadcast.
    let weights = Tensor::new(&[[1f64, 2.0, 2.0], [2.0, 4.0, 4.0]], device())?;
    let turned = Tensor::new(&[[10f64, 1.0], [20.0, 2.0], [20.0, 2.0]], device())?.t()?;
    let pairs = vec![(Var::from_tensor(&weights)?, turned)];
    let (got, _) = clipped(rule(1.0, AgcUnits::Rows), &pairs)?;
    assert_all_close(&got[0], &[1.0, 2.0, 2.0, 1.0, 2.0, 2.0], 1e-12, "turned");
    let one = Tensor::new(&[[60f64]], device())?.broadcast_as((2, 3))?;
    let pairs = vec![(Var::from_tensor(&weights)?, one)];
    for (norm_type, right) in [(1.0, [5.0 / 3.0, 10.0 / 3.0]), (f64::INFINITY, [2.0, 4.0])] {
        let clip = Clip::from(rule(1.0, AgcUnits::Rows)).norm_type(norm_type.into());
        for backend in backends() {
            let (got, _) = backend::with_backend(backend, || clipped(clip.clone(), &pairs))?;
            let right: Vec<f64> = right.iter().flat_map(|x| [*x; 3]).collect();
            assert_all_close(&got[0], &right, 1e-12, "norm type");
        }
    }
    Ok(())
}
