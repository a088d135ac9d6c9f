//! What timm and optax make of gradients by units: see `tests/cases/README.md`.

use anyhow::Result;
use candle_core::{DType, Var};
use candle_grad_clip::backend;
use candle_grad_clip::{Agc, AgcUnits, Clip, ClippedOptimizer};
use candle_nn::Optimizer;
use support::cases::CaseFile;
use support::device::backends;
use support::gradients::{store_for, tensor, values};
use support::optimizers::Recorder;
use support::oracle::assert_all_close;

#[derive(serde::Deserialize)]
struct Case {
    clipping: f64,
    eps: f64,
    tensors: Vec<CaseTensor>,
}

#[derive(serde::Deserialize)]
struct CaseTensor {
    shape: Vec<usize>,
    weights: Vec<f64>,
    grad: Vec<f64>,
    expect: Vec<f64>,
}

fn agrees(text: &str, units: AgcUnits) -> Result<()> {
    let file: CaseFile<Case> = CaseFile::parse(text)?;
    assert_eq!(file.cases.len(), 60);
    let mut changed = 0;
    for (at, case) in file.cases.iter().enumerate() {
        for backend in backends() {
            let what = format!("{} {at}, {backend:?}", file.framework);
            let (mut vars, mut grads) = (Vec::new(), Vec::new());
            for one in &case.tensors {
                let shape = &one.shape[..];
                vars.push(Var::from_tensor(&tensor(&one.weights, shape, DType::F64)?)?);
                grads.push(tensor(&one.grad, shape, DType::F64)?);
            }
            let clip = Clip::from(Agc {
                clipping: case.clipping,
                eps: case.eps,
                units,
                exclude: Vec::new(),
            });
            let inner = Recorder::new(vars.clone(), true)?;
            let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip)?;
            backend::with_backend(backend, || opt.step(&store_for(&vars, &grads)))?;
            for (one, got) in case.tensors.iter().zip(&opt.inner().steps[0]) {
                let got = values(got.as_ref().unwrap())?;
                assert_all_close(&got, &one.expect, 1e-14, &what);
                changed += u32::from(one.grad != one.expect);
            }
        }
    }
    assert!(changed > 100, "{changed}");
    Ok(())
}

#[test]
fn timm() -> Result<()> {
    agrees(include_str!("../cases/agc_timm.json"), AgcUnits::Rows)
}

#[test]
fn optax() -> Result<()> {
    agrees(include_str!("../cases/agc_optax.json"), AgcUnits::Optax)
}
