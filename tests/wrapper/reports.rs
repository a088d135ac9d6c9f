//! What a step's report says is what happened.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NamedVars, NonFinite, NormType, StepPath};
use candle_nn::{Optimizer, SGD, VarBuilder, VarMap};
use support::device::{backends, device, kernels};
use support::gradients::{all_values, empty_store, random_values, store_for, tensor};
use support::optimizers::Recorder;
use support::oracle::{self, assert_close, tolerance};

/// Two Vars, `a` of six values and `b` of three, and gradients for them.
fn named(dtype: DType) -> Result<(NamedVars, Vec<Var>, Vec<Tensor>)> {
    let gradients = vec![
        tensor(&random_values(6, 1), (2, 3), dtype)?,
        tensor(&random_values(3, 2), 3, dtype)?,
    ];
    let vars: Vec<Var> = gradients
        .iter()
        .map(support::gradients::var_for)
        .collect::<candle_core::Result<_>>()?;
    let names = ["a", "b"].map(String::from);
    let named: Vec<(String, Var)> = names.into_iter().zip(vars.clone()).collect();
    Ok((named.into(), vars, gradients))
}

fn recorder(vars: &[Var], clip: Clip) -> Result<ClippedOptimizer<Recorder>> {
    let inner = Recorder::new(vars.to_vec(), true)?;
    Ok(ClippedOptimizer::wrap(inner, vars.to_vec(), clip)?)
}

/// What the inner optimizer was given in its last step.
fn given(opt: &ClippedOptimizer<Recorder>) -> Result<Vec<f64>> {
    let last = opt.inner().steps.last().unwrap();
    Ok(all_values(
        &last.iter().flatten().cloned().collect::<Vec<_>>(),
    )?)
}

#[test]
fn norms_and_coefficient_are_those_of_the_gradients_before_and_after() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for backend in backends() {
            for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.0)] {
                let limits = [
                    Clip::norm(0.5),
                    Clip::value(0.5),
                    Clip::norm(1e3),
                    Clip::none(),
                ];
                for clip in limits {
                    let what = format!("{dtype:?} {backend:?} {norm_type}-norm {clip}");
                    let (_, vars, gradients) = named(dtype)?;
                    let mut opt = recorder(&vars, clip.clone().norm_type(norm_type))?;
                    let store = store_for(&vars, &gradients);
                    let report = backend::with_backend(backend, || opt.step_report(&store))?;
                    let record = report.record()?;

                    let floor = if backend == kernels() { 1e-12 } else { 2e-6 };
                    let tolerance = tolerance(dtype).max(floor);
                    let (before, after) = (all_values(&gradients)?, given(&opt)?);
                    let p = norm_type.p();
                    assert_eq!(record.norm_type, norm_type);
                    assert_close(record.total_norm, oracle::norm(&before, p), floor, &what);
                    assert_close(
                        record.clipped_norm,
                        oracle::norm(&after, p),
                        tolerance,
                        &what,
                    );
                    let changed = before.iter().zip(&after).filter(|(x, y)| x != y).count();
                    assert_eq!(record.was_clipped, changed > 0, "{what}");
                    assert_eq!(
                        record.was_clipped,
                        record.path == StepPath::Copied,
                        "{what}"
                    );
                    if clip == Clip::norm(0.5) {
                        let coef = oracle::clip_coef(record.total_norm, 0.5, 1e-6);
                        assert_close(record.clip_coef, coef, 1e-15, &what);
                    } else {
                        assert_eq!(record.clip_coef, 1.0, "{what}");
                    }
                    let by_value = clip == Clip::value(0.5);
                    let num_clipped = if by_value { changed as u64 } else { 0 };
                    assert_eq!(record.num_clipped, num_clipped, "{what}");
                    assert_eq!((record.non_finite, record.skipped), (0, false), "{what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_gradient_at_the_rounded_bound_is_not_clipped() -> Result<()> {
    // 0.1 is no f32, f16 or bf16: the bound that elements get is its rounded value, above it.
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for backend in backends() {
            let what = format!("{dtype:?} {backend:?}");
            let gradients = [tensor(&[0.3, -0.2, 0.05], 3, dtype)?];
            let vars = [support::gradients::var_for(&gradients[0])?];
            let mut opt = recorder(&vars, Clip::value(0.1))?;
            let first =
                backend::with_backend(backend, || opt.step_report(&store_for(&vars, &gradients)))?;
            assert_eq!(first.record()?.num_clipped, 2, "{what}");
            let clipped = oracle::norm(&given(&opt)?, 2.0);
            assert_close(first.record()?.clipped_norm, clipped, 1e-6, &what);

            let clipped = [tensor(&given(&opt)?, 3, dtype)?];
            let again =
                backend::with_backend(backend, || opt.step_report(&store_for(&vars, &clipped)))?;
            assert_eq!(again.record()?.num_clipped, 0, "{what}");
            assert!(!again.was_clipped()?, "{what}");
            assert_eq!(again.path(), StepPath::Unchanged, "{what}");
        }
    }
    Ok(())
}

#[test]
fn eps_is_the_one_that_was_asked_for() -> Result<()> {
    let (_, vars, gradients) = named(DType::F64)?;
    let store = store_for(&vars, &gradients);
    let norm = oracle::norm(&all_values(&gradients)?, 2.0);
    for eps in [0.0, 1e-6, 0.5] {
        let mut opt = recorder(&vars, Clip::norm(0.25).eps(eps))?;
        let coef = opt.step_report(&store)?.clip_coef()?;
        assert_close(coef, 0.25 / (norm + eps), 1e-14, &format!("eps {eps}"));
    }
    Ok(())
}

#[test]
fn every_report_keeps_its_own_numbers() -> Result<()> {
    let (_, vars, gradients) = named(DType::F32)?;
    let mut opt = recorder(&vars, Clip::norm(1.0))?;
    assert!(opt.last_report().is_none());
    let first = opt.step_report(&store_for(&vars, &gradients))?;
    let before = first.record()?;
    let doubled: Vec<Tensor> = gradients
        .iter()
        .map(|g| g * 2.0)
        .collect::<candle_core::Result<_>>()?;
    let second = opt.step_report(&store_for(&vars, &doubled))?;
    assert_eq!(first.record()?, before);
    assert_eq!((first.step(), second.step()), (1, 2));
    assert_close(
        second.total_norm()?,
        2.0 * first.total_norm()?,
        1e-7,
        "doubled",
    );
    assert_eq!(opt.last_report().unwrap().step(), 2);
    Ok(())
}

#[test]
fn param_norms_come_on_demand_by_name_in_order() -> Result<()> {
    let (named, vars, gradients) = named(DType::F64)?;
    let store = store_for(&vars, &gradients);
    for backend in backends() {
        let inner = Recorder::new(vars.clone(), false)?;
        let mut opt = ClippedOptimizer::wrap(inner, named.clone(), Clip::norm(1.0))?;
        let report = backend::with_backend(backend, || opt.step_report(&store))?;
        assert!(report.record()?.param_norms.is_empty(), "not asked for");
        assert!(
            report.record()?.largest_param_norms(3).is_empty(),
            "not asked for"
        );

        let mut opt = opt.with_param_norms(true);
        let report = backend::with_backend(backend, || opt.step_report(&store))?;
        let norms = &report.record()?.param_norms;
        assert_eq!([&norms[0].0, &norms[1].0], ["a", "b"]);
        for ((name, norm), gradient) in norms.iter().zip(&gradients) {
            let right = oracle::norm(&support::gradients::values(gradient)?, 2.0);
            assert_close(*norm, right, 1e-12, name);
        }
        let together = norms[0].1.hypot(norms[1].1);
        assert_close(report.total_norm()?, together, 1e-12, "of all");
    }
    Ok(())
}

#[test]
fn the_largest_param_norms_come_first_and_nan_before_all() -> Result<()> {
    let names = ["none", "small", "large", "nan", "inf", "middle"];
    let norms = [
        None,
        Some(1.0),
        Some(100.0),
        Some(f64::NAN),
        Some(f64::INFINITY),
        Some(10.0),
    ];
    let mut named = Vec::new();
    let mut store = empty_store()?;
    for (name, norm) in names.into_iter().zip(norms) {
        let var = Var::zeros(1, DType::F32, device())?;
        if let Some(norm) = norm {
            store.insert(&var, tensor(&[norm], 1, DType::F32)?);
        }
        named.push((name.to_string(), var));
    }
    let vars = NamedVars::from(named);
    let inner = Recorder::new(vars.vars().to_vec(), false)?;
    let mut opt = ClippedOptimizer::wrap(inner, vars, Clip::none())?.with_param_norms(true);
    let report = opt.step_report(&store)?;
    let largest = report.record()?.largest_param_norms(4);
    let order: Vec<&str> = largest.iter().map(|(name, _)| *name).collect();
    assert_eq!(order, ["nan", "inf", "large", "middle"]);
    assert_eq!(report.record()?.largest_param_norms(100).len(), 6);
    assert_eq!(report.record()?.largest_param_norms(100)[5], ("none", 0.0));
    Ok(())
}

#[test]
fn missing_vars_are_named_but_for_the_expected_ones() -> Result<()> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, device());
    let head = candle_nn::linear(3, 1, vb.pp("head"))?;
    candle_nn::linear(3, 3, vb.pp("forgotten"))?;
    candle_nn::batch_norm(3, 1e-5, vb.pp("norm"))?;
    let x = Tensor::ones((2, 3), DType::F32, device())?;
    let loss = candle_nn::Module::forward(&head, &x)?.sum_all()?;

    let opt = SGD::new(varmap.all_vars(), 0.1)?;
    let mut opt = ClippedOptimizer::wrap(opt, &varmap, Clip::none())?;
    let all = [
        "forgotten.bias",
        "forgotten.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.weight",
    ];
    assert_eq!(opt.backward_step_report(&loss)?.missing_grads(), all);
    let mut opt = opt.ignore_missing_grads(&["norm.running_"]);
    let report = opt.backward_step_report(&loss)?;
    assert_eq!(report.missing_grads(), [all[0], all[1], all[2], all[5]]);
    assert_eq!(report.record()?.missing_grads, report.missing_grads());
    let mut again =
        ClippedOptimizer::wrap(SGD::new(varmap.all_vars(), 0.1)?, &varmap, Clip::none())?
            .ignore_missing_grads(&["*.running_"]);
    assert_eq!(
        again.backward_step_report(&loss)?.missing_grads(),
        [all[0], all[1], all[2], all[5]]
    );
    let mut opt = opt.ignore_missing_grads(&["norm", "forgotten.bias"]);
    assert_eq!(
        opt.backward_step_report(&loss)?.missing_grads(),
        ["forgotten.weight"]
    );
    Ok(())
}

#[test]
fn some_vars_of_a_map_are_chosen_by_pattern() -> Result<()> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, device());
    for name in ["actor.0", "actor.1", "critic"] {
        candle_nn::linear(2, 1, vb.pp(name))?;
    }
    let all = || NamedVars::from(&varmap);
    let chosen = all().matching(&["critic.*", "actor.?.weight"])?;
    let names = [
        "actor.0.weight",
        "actor.1.weight",
        "critic.bias",
        "critic.weight",
    ];
    assert_eq!(chosen.names(), names);
    let data = varmap.data().lock().unwrap();
    for (name, var) in names.iter().zip(chosen.vars()) {
        assert_eq!(var.id(), data[*name].id(), "{name}");
    }
    drop(data);
    let error = all().matching(&["actor.*", "critic"]).unwrap_err();
    assert!(
        matches!(&error, Error::UnmatchedPattern { pattern, vars: 6, .. } if pattern == "critic"),
        "{error}"
    );
    assert!(all().matching(&[])?.names().is_empty());
    Ok(())
}

#[test]
fn names_come_from_the_map_the_list_or_the_place() -> Result<()> {
    let var = || Var::zeros(2, DType::F32, device());
    let (a, b) = (var()?, var()?);
    let list = vec![("z".to_string(), a.clone()), ("y".to_string(), b.clone())];
    assert_eq!(
        NamedVars::from(list).names(),
        ["z", "y"],
        "in the given order"
    );
    assert_eq!(
        NamedVars::from(vec![a.clone(), b.clone()]).names(),
        ["var.0", "var.1"]
    );

    let tied = vec![
        ("embed".to_string(), a.clone()),
        ("head".to_string(), a.clone()),
    ];
    assert_eq!(
        NamedVars::from(tied).names(),
        ["embed"],
        "a tied Var counts once"
    );
    assert_eq!(
        NamedVars::from(vec![a.clone(), a, b]).names(),
        ["var.0", "var.2"]
    );

    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, device());
    let mut names: Vec<String> = (0..30).map(|i| format!("layer.{i}")).collect();
    for name in &names {
        vb.get_with_hints(1, name, candle_nn::init::ZERO)?;
    }
    names.sort();
    assert_eq!(NamedVars::from(&varmap).names(), names, "sorted");
    Ok(())
}

#[test]
fn a_cleaned_step_counts_what_was_bad() -> Result<()> {
    let gradients = [tensor(&[f64::NAN, 3.0, f64::INFINITY, 4.0], 4, DType::F32)?];
    let vars = [support::gradients::var_for(&gradients[0])?];
    let clip = Clip::norm(1.0).non_finite(NonFinite::Zero);
    let mut opt = recorder(&vars, clip)?;
    let report = opt.step_report(&store_for(&vars, &gradients))?;
    assert_eq!(report.record()?.non_finite, 2);
    assert_close(report.total_norm()?, 5.0, 1e-6, "of the finite elements");
    assert_close(report.clip_coef()?, 0.2, 1e-6, "of the finite elements");
    assert_close(
        report.record()?.clipped_norm,
        1.0,
        1e-6,
        "of the finite elements",
    );
    let given = given(&opt)?;
    assert_eq!((given[0], given[2]), (0.0, 0.0));
    assert_close(given[1], 0.6, 1e-6, "3 of (3, 4)");
    Ok(())
}

#[test]
fn a_norm_that_f64_does_not_hold_is_reported_right_after_clipping() -> Result<()> {
    let var = Var::zeros(3, DType::F64, device())?;
    let mut opt = ClippedOptimizer::wrap(
        SGD::new(vec![var.clone()], 0.0)?,
        vec![var.clone()],
        Clip::norm(1.0).non_finite(NonFinite::Zero),
    )?;
    let mut grads = empty_store()?;
    let values = [f64::MAX, f64::MAX, f64::INFINITY];
    grads.insert(&var, Tensor::new(&values, device())?);
    let report = opt.step_report(&grads)?;
    assert!(
        (report.record()?.clipped_norm - 1.0).abs() < 1e-12,
        "{report:?}"
    );
    assert_eq!(report.record()?.non_finite, 1);
    // A root that overflows: the coefficient is below what f64 holds.
    let many = Var::zeros(20_000, DType::F64, device())?;
    let mut opt = ClippedOptimizer::wrap(
        SGD::new(vec![many.clone()], 0.0)?,
        vec![many.clone()],
        Clip::norm(1.0).norm_type(NormType::P(0.01)),
    )?;
    grads.insert(&many, many.ones_like()?.detach());
    assert_eq!(opt.step_report(&grads)?.record()?.clipped_norm, 0.0);
    Ok(())
}
