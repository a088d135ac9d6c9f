//! The lists of Vars that the free functions take, and the names in their errors.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Var};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{
    AsVars, Clip, ClipGradNorm, ClippedOptimizer, NamedVars, NormType, clip_by_global_norm,
    clip_grad_norm, clip_grad_norm_with, clip_grad_value, clip_grads_with_norm, total_norm,
};
use candle_nn::{Init, VarMap};
use support::device::device;
use support::gradients::{bits_of_gradients, gradients_of, store_for, tensor, values};
use support::oracle::assert_all_close;

/// Vars of a map, in the order of their names, and their gradients: (3) and (4).
fn start() -> Result<(VarMap, Vec<Var>, GradStore)> {
    let map = VarMap::new();
    for name in ["a", "b"] {
        map.get(1, name, Init::Const(0.0), DType::F64, device())?;
    }
    let vars = NamedVars::from(&map).vars().to_vec();
    let gradients = [
        tensor(&[3.0], 1, DType::F64)?,
        tensor(&[4.0], 1, DType::F64)?,
    ];
    let store = store_for(&vars, &gradients);
    Ok((map, vars, store))
}

/// All functions, and what they leave: the same for each kind of list.
fn run(vars: &(impl AsVars + ?Sized), all: &[Var], grads: &GradStore) -> Result<Vec<f64>> {
    let copies = || -> Result<GradStore> {
        Ok(store_for(
            all,
            &support::gradients::copies(&gradients_of(grads, all)?)?,
        ))
    };
    let mut out = vec![total_norm(grads, vars, NormType::L2)?];
    let mut after = |store: &GradStore| -> Result<()> {
        for grad in gradients_of(store, all)? {
            out.extend(values(&grad)?);
        }
        Ok(())
    };
    let mut store = copies()?;
    assert_eq!(clip_grad_norm(&mut store, vars, 2.5)?, 5.0);
    after(&store)?;
    store = copies()?;
    assert_eq!(
        clip_grad_norm_with(&mut store, vars, &ClipGradNorm::default())?,
        5.0
    );
    after(&store)?;
    store = copies()?;
    clip_grads_with_norm(&mut store, vars, 1.0, 10.0)?;
    after(&store)?;
    store = copies()?;
    clip_grad_value(&mut store, vars, 3.5)?;
    after(&store)?;
    after(&clip_by_global_norm(grads, vars, 2.5, None)?.0)?;
    Ok(out)
}

#[test]
fn every_kind_of_list_gives_the_same() -> Result<()> {
    let (map, vars, grads) = start()?;
    let right = run(&vars, &vars, &grads)?;
    let expected = [5.0, 1.5, 2.0, 0.6, 0.8, 0.3, 0.4, 3.0, 3.5, 1.5, 2.0];
    assert_all_close(&right, &expected, 1e-6, "by hand");
    let slice: &[Var] = &vars;
    let [a, b] = [&vars[0], &vars[1]];
    let pairs = vec![("a".to_string(), a.clone()), ("b".to_string(), b.clone())];
    let sgd = Sgd::from_named_vars(&map, 0.1)?;
    let opt = ClippedOptimizer::wrap(sgd, &map, Clip::norm(1.0))?;
    for (kind, got) in [
        ("&[Var]", run(slice, &vars, &grads)?),
        ("&&[Var]", run(&slice, &vars, &grads)?),
        ("&[Var; 2]", run(&[a.clone(), b.clone()], &vars, &grads)?),
        ("all_vars", run(&map.all_vars(), &vars, &grads)?),
        ("&[&Var; 2]", run(&[a, b], &vars, &grads)?),
        ("&Vec<&Var>", run(&vec![a, b], &vars, &grads)?),
        ("&[&Var]", run(&[a, b][..], &vars, &grads)?),
        ("twice", run(&[a, b, a], &vars, &grads)?),
        ("pairs", run(&pairs, &vars, &grads)?),
        ("&[(String, Var)]", run(&pairs[..], &vars, &grads)?),
        ("&VarMap", run(&map, &vars, &grads)?),
        ("&NamedVars", run(&NamedVars::from(&map), &vars, &grads)?),
        ("vars of a wrapper", run(opt.vars(), &vars, &grads)?),
    ] {
        assert_all_close(&got, &right, 1e-15, kind);
    }
    Ok(())
}

#[test]
fn errors_have_the_names_that_are_known() -> Result<()> {
    let (map, vars, _) = start()?;
    let bad = [
        tensor(&[3.0], 1, DType::F64)?,
        tensor(&[f64::NAN], 1, DType::F64)?,
    ];
    let mut grads = store_for(&vars, &bad);
    let before = bits_of_gradients(&grads, &vars)?;
    let error = |error: candle_grad_clip::Result<f64>, name: &str| {
        let error = error.unwrap_err().to_string();
        assert!(error.contains(name), "{error}, expected {name}");
    };
    error(clip_grad_norm(&mut grads, &vars, 1.0), "Var is var.1 ");
    error(
        clip_grad_norm(&mut grads, &[&vars[1]], 1.0),
        "Var is var.0 ",
    );
    error(clip_grad_norm(&mut grads, &map, 1.0), "Var is b ");
    error(
        clip_grad_norm(&mut grads, &NamedVars::from(&map), 1.0),
        "Var is b ",
    );
    let head = [("head".to_string(), vars[1].clone())];
    error(clip_grad_norm(&mut grads, &head, 1.0), "Var is head ");
    // A wrong shape, by name.
    let wrong = [
        tensor(&[3.0], 1, DType::F64)?,
        tensor(&[1.0, 2.0], 2, DType::F64)?,
    ];
    error(
        total_norm(&store_for(&vars, &wrong), &map, NormType::L2),
        "b has shape",
    );
    assert_eq!(bits_of_gradients(&grads, &vars)?, before);
    // No Vars: nothing to do.
    let none: &[Var] = &[];
    assert_eq!(clip_grad_norm(&mut grads, none, 1.0)?, 0.0);
    assert_eq!(clip_grad_norm(&mut grads, &VarMap::new(), 1.0)?, 0.0);
    Ok(())
}
