//! What users of other libraries reported, tried on ours: it was right from the start, and stays
//! so.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, NamedVars, NormType, clip_grad_norm, total_norm};
use candle_nn::{Optimizer, ParamsAdamW, SGD};
use support::checkpoints::Folder;
use support::device::{device, on_every_backend};
use support::gradients::{
    bits_of_vars, loss_with_gradients, random_values, store_for, store_of, tensor, values,
};
use support::oracle::{self, assert_all_close, assert_close};

use super::{EXACT, elements, vector};

/// Vars at zero after one step of rate 1: the gradients that reached the optimizer, sign turned.
fn moved(vars: &[Var]) -> Result<Vec<f64>> {
    let all: Vec<Vec<f64>> = vars.iter().map(|v| values(v)).collect::<Result<_, _>>()?;
    Ok(all.concat().iter().map(|x| 0.0 - x).collect())
}

/// automl issue 910: each variable by its own norm, and then all by the norm of what that left.
#[test]
fn each_variable_and_then_all() -> Result<()> {
    on_every_backend(|| {
        let gradients = [
            vector(&[3.0, 0.0])?,  // norm 3, becomes 1
            vector(&[0.0, 0.5])?,  // stays
            vector(&[-8.0, 6.0])?, // norm 10, becomes 1
        ];
        let clip = || Clip::chain([Clip::param_norm(1.0).eps(0.0), Clip::norm(0.75).eps(0.0)]);
        // The norm of what is left is 1.5: all is halved. All at once first would give others.
        let right = [0.5, 0.0, 0.0, 0.25, -0.4, 0.3];
        let (vars, store) = store_of(&gradients)?;
        let inner = SGD::new(vars.clone(), 1.0)?;
        let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip()?)?;
        let report = opt.step_report(&store)?;
        assert_all_close(&moved(&vars)?, &right, EXACT, "around candle's");
        assert_close(report.total_norm()?, 109.25f64.sqrt(), EXACT, "before");
        assert_close(report.record()?.clipped_norm, 0.75, EXACT, "after");
        let (vars, store) = store_of(&gradients)?;
        let inner = Sgd::new(vars.clone(), 1.0.into())?;
        let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip()?)?;
        opt.step_report(&store)?;
        assert_all_close(&moved(&vars)?, &right, EXACT, "fused");
        Ok(())
    })
}

/// dynet issue 1374: the norm that is limited is that of all sixteen parameters, not of each.
#[test]
fn sixteen_parameters_are_clipped_together() -> Result<()> {
    on_every_backend(|| {
        // Each has the norm 1, which the limit of 2 leaves alone; together they have 4.
        let gradients = || -> Result<Vec<Tensor>> {
            let one = |i: usize| Ok(vector(&[[0.6, 0.8], [-0.8, 0.6]][i % 2])?);
            (0..16).map(one).collect()
        };
        let halves: Vec<f64> = (0..16)
            .flat_map(|i| [[0.3, 0.4], [-0.4, 0.3]][i % 2])
            .collect();
        let (vars, mut grads) = store_of(&gradients()?)?;
        assert_close(clip_grad_norm(&mut grads, &vars, 2.0)?, 4.0, EXACT, "norm");
        assert_all_close(&elements(&grads, &vars)?, &halves, 3e-7, "free function");

        let (vars, store) = store_of(&gradients()?)?;
        let clip = Clip::norm(2.0).eps(0.0);
        let inner = Sgd::new(vars.clone(), 1.0.into())?;
        let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip)?;
        let report = opt.step_report(&store)?;
        assert_close(report.total_norm()?, 4.0, EXACT, "norm");
        assert_all_close(&moved(&vars)?, &halves, EXACT, "wrapper");

        // A limit for each is another rule, which leaves them.
        let (vars, store) = store_of(&gradients()?)?;
        let clip = Clip::param_norm(2.0).eps(0.0);
        let inner = SGD::new(vars.clone(), 1.0)?;
        let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip)?;
        assert!(!opt.step_report(&store)?.was_clipped()?);
        Ok(())
    })
}

/// Megatron-LM issue 7227: an embedding that is the head's weight too counts once in the norm, and
/// its gradient is the sum of both uses.
#[test]
fn tied_weights_count_once() -> Result<()> {
    on_every_backend(|| {
        let table = Var::from_tensor(&tensor(&random_values(12, 1), (4, 3), DType::F64)?)?;
        let scale = Var::from_tensor(&vector(&[1.5, -0.5, 1.0])?)?;
        let loss = || -> Result<Tensor> {
            let ids = Tensor::new(&[0u32, 2, 2], device())?;
            let hidden = table.index_select(&ids, 0)?.broadcast_mul(&scale)?;
            Ok(hidden.matmul(&table.t()?)?.sqr()?.sum_all()?)
        };
        let grads = loss()?.backward()?;
        let once = [table.clone(), scale.clone()];
        let right = oracle::norm(&elements(&grads, &once)?, 2.0);
        let tied = [table.clone(), scale.clone(), table.clone()];
        assert_close(total_norm(&grads, &tied, NormType::L2)?, right, EXACT, "");

        let coef = 1.0 / right;
        let expected: Vec<f64> = elements(&grads, &once)?
            .iter()
            .zip(values(&table)?.iter().chain(&values(&scale)?))
            .map(|(g, w)| w - g * coef)
            .collect();
        let named: Vec<(String, Var)> = ["embed", "scale", "head"]
            .iter()
            .zip(tied)
            .map(|(name, var)| ((*name).to_owned(), var))
            .collect();
        let inner = SGD::new(once.to_vec(), 1.0)?;
        let mut opt = ClippedOptimizer::wrap(inner, named, Clip::norm(1.0).eps(0.0))?;
        let report = opt.backward_step_report(&loss()?)?;
        assert_close(report.total_norm()?, right, EXACT, "wrapper");
        let after = [values(&table)?, values(&scale)?].concat();
        // The difference of numbers of about 1.
        for (x, y) in after.iter().zip(&expected) {
            assert!((x - y).abs() <= 4.0 * f64::EPSILON, "{x}, expected {y}");
        }
        Ok(())
    })
}

/// `KempnerForge` issue 115: moments are warm after a load, not zeros, so the next step is that of
/// a run that was never interrupted.
#[test]
fn moments_are_warm_after_a_load() -> Result<()> {
    on_every_backend(|| {
        let folder = Folder::in_memory()?;
        let (path, again) = (folder.join("a.safetensors"), folder.join("b.safetensors"));
        let start = tensor(&random_values(6, 7), (2, 3), DType::F32)?;
        let params = ParamsAdamW {
            lr: 0.1,
            ..ParamsAdamW::default()
        };
        let make = |weights: &Tensor| -> Result<(NamedVars, ClippedOptimizer<AdamW>)> {
            let vars = NamedVars::from(vec![("w".to_owned(), Var::from_tensor(weights)?)]);
            let inner = AdamW::from_named_vars(vars.clone(), params.clone())?;
            let opt = ClippedOptimizer::wrap(inner, vars.clone(), Clip::norm(0.5))?;
            Ok((vars, opt))
        };
        let step = |opt: &mut ClippedOptimizer<AdamW>, vars: &NamedVars, at: u64| -> Result<()> {
            let gradient = tensor(&random_values(6, at), (2, 3), DType::F32)?;
            let loss = loss_with_gradients(vars.vars(), &[gradient])?;
            Ok(opt.backward_step(&loss)?)
        };
        let (vars, mut whole) = make(&start)?;
        for at in 0..5 {
            step(&mut whole, &vars, at)?;
        }
        whole.save(&path)?;
        let weights = vars.vars()[0].copy()?;
        let (loaded_vars, mut loaded) = make(&weights)?;
        let (cold_vars, mut cold) = make(&weights)?;
        loaded.load(&path)?;
        loaded.save(&again)?;
        assert_eq!(std::fs::read(&path)?, std::fs::read(&again)?, "the state");
        for at in 5..8 {
            step(&mut whole, &vars, at)?;
            step(&mut loaded, &loaded_vars, at)?;
            step(&mut cold, &cold_vars, at)?;
            let right = bits_of_vars(vars.vars())?;
            assert_eq!(bits_of_vars(loaded_vars.vars())?, right, "step {at}");
            assert_ne!(bits_of_vars(cold_vars.vars())?, right, "zeros show");
        }
        // The moments in the file, from the gradients that were clipped.
        let (mut first, mut second) = ([0.0; 6], [0.0; 6]);
        for at in 0..5 {
            let gradient = random_values(6, at);
            let coef = oracle::clip_coef(oracle::norm(&gradient, 2.0), 0.5, 1e-6);
            for (i, g) in gradient.iter().map(|g| g * coef).enumerate() {
                first[i] = params.beta1 * first[i] + (1.0 - params.beta1) * g;
                second[i] = params.beta2 * second[i] + (1.0 - params.beta2) * g * g;
            }
        }
        let file = candle_core::safetensors::load(&path, device())?;
        let largest = oracle::norm(&first, f64::INFINITY);
        for (x, y) in values(&file["w.first_moment"])?.iter().zip(first) {
            // A sum of both signs.
            assert!((x - y).abs() <= 1e-6 * largest, "{x}, expected {y}");
        }
        assert_all_close(&values(&file["w.second_moment"])?, &second, 1e-6, "second");
        Ok(())
    })
}

/// The helper above sees what it should: an unclipped step moves by the gradient.
#[test]
fn an_unclipped_step_moves_by_the_gradient() -> Result<()> {
    let vars = [Var::from_tensor(&vector(&[0.0, 0.0])?)?];
    let store = store_for(&vars, &[vector(&[3.0, -4.0])?]);
    SGD::new(vars.to_vec(), 1.0)?.step(&store)?;
    assert_eq!(moved(&vars)?, [3.0, -4.0]);
    Ok(())
}
