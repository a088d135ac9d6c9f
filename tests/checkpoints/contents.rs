//! What a file holds, and what of it comes back.

use std::fs;

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NamedVars, NonFinite, NormType};
use candle_nn::{Optimizer, ParamsAdamW};
use support::checkpoints::{self, Folder};
use support::device::device;
use support::gradients::{bits_of_vars, store_for};

use super::resume::{adamw_params, gradients, model, momentum_params, pair, small};

#[test]
fn skips_in_a_row_are_counted_on() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let (w, named) = small()?;
    let make = |max_skips| {
        let clip = Clip::norm(1.0).max_skips(max_skips);
        ClippedOptimizer::wrap(
            Sgd::from_named_vars(named.clone(), 0.1)?,
            named.clone(),
            clip,
        )
    };
    let bad = store_for(
        std::slice::from_ref(&w),
        &[Tensor::new(&[f32::NAN, 0.0], device())?],
    );
    let mut opt = make(2)?;
    for _ in 0..2 {
        assert!(opt.step_report(&bad)?.skipped()?);
    }
    opt.save(&path)?;
    let mut resumed = make(100)?;
    resumed.load(&path)?;
    assert!(resumed.last_report().is_none());
    let mut last = resumed.step_report(&bad);
    if let (Ok(report), true) = (&last, device().is_cuda()) {
        assert!(report.skipped()?); // its result is here now: the next step notices
        last = resumed.step_report(&bad);
    }
    let error = last.unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooManySkips {
                skips: 3,
                max_skips: 2,
                ..
            }
        ),
        "{error}"
    );
    let good = store_for(&[w], &[Tensor::ones(2, DType::F32, device())?]);
    let launched = u64::from(device().is_cuda()); // one more, before it was noticed
    assert_eq!(resumed.step_report(&good)?.step(), 3 + launched);
    Ok(())
}

#[test]
fn hyper_parameters_and_clips_come_back_exactly() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let (_, named) = small()?;
    for lr in [
        0.1 + 0.2,
        0.0,
        5e-324,
        f64::MAX,
        1.0 / 3.0,
        1e-310,
        123_456_789.123_456_79,
    ] {
        let params = ParamsAdamW {
            lr,
            beta1: 0.0,
            beta2: 1.0 - f64::EPSILON,
            eps: lr,
            weight_decay: lr,
        };
        AdamW::from_named_vars(named.clone(), params)?.save(&path)?;
        let mut opt = AdamW::from_named_vars(named.clone(), ParamsAdamW::default())?;
        opt.load(&path)?;
        let got = opt.params();
        let got = [got.lr, got.beta1, got.beta2, got.eps, got.weight_decay].map(f64::to_bits);
        let expected = [lr, 0.0, 1.0 - f64::EPSILON, lr, lr].map(f64::to_bits);
        assert_eq!(got, expected);
    }
    let clips = [
        Clip::none(),
        Clip::norm(f64::INFINITY).eps(0.0),
        Clip::norm(0.1 + 0.2)
            .norm_type(NormType::P(2.0))
            .eps(5e-324),
        Clip::norm(f64::MIN_POSITIVE).norm_type(NormType::P(1.0 / 3.0)),
        Clip::norm(1.0)
            .norm_type(NormType::P(f64::INFINITY))
            .non_finite(NonFinite::Error),
        Clip::norm(1.0)
            .norm_type(NormType::L1)
            .non_finite(NonFinite::Zero),
        Clip::value(0.7)
            .norm_type(NormType::Inf)
            .non_finite(NonFinite::Propagate),
        Clip::value(f64::INFINITY).max_skips(u32::MAX),
    ];
    for clip in clips {
        let make = |clip: &Clip| {
            let opt = Sgd::from_named_vars(named.clone(), 0.1)?;
            ClippedOptimizer::wrap(opt, named.clone(), clip.clone())
        };
        make(&clip)?.save(&path)?;
        let mut opt = make(&Clip::norm(3.0))?;
        opt.load(&path)?;
        assert_eq!(opt.clip(), &clip);
    }
    Ok(())
}

#[test]
fn a_file_goes_into_a_wrapper_and_out_of_one() -> Result<()> {
    let folder = Folder::new()?;
    let (w, named) = small()?;
    let bare = || AdamW::from_named_vars(named.clone(), adamw_params());
    let clipped = |max_norm| ClippedOptimizer::wrap(bare()?, named.clone(), Clip::norm(max_norm));
    let mut opt = bare()?;
    for _ in 0..3 {
        opt.backward_step(&w.sqr()?.sum_all()?)?;
    }
    opt.save(folder.join("bare"))?;
    let mut into = clipped(0.5)?;
    into.backward_step(&w.sqr()?.sum_all()?)?;
    into.load(folder.join("bare"))?;
    assert_eq!(into.clip(), &Clip::norm(0.5)); // as it was
    assert_eq!(into.inner().steps(), 3);
    assert_eq!(into.backward_step_report(&w.sqr()?.sum_all()?)?.step(), 2);
    into.save(folder.join("clipped"))?;
    let mut out = bare()?;
    out.load(folder.join("clipped"))?;
    assert_eq!(out.steps(), 4);
    out.save(folder.join("again"))?;
    into.inner().save(folder.join("inner"))?;
    assert_eq!(
        fs::read(folder.join("again"))?,
        fs::read(folder.join("inner"))?
    );
    Ok(())
}

#[test]
fn the_momentum_of_the_file_decides_what_is_kept() -> Result<()> {
    let folder = Folder::new()?;
    let (w, named) = small()?;
    let plain = || Sgd::from_named_vars(named.clone(), 0.1);
    let momentum = || Sgd::from_named_vars(named.clone(), momentum_params(false));
    let step = |opt: &mut Sgd| opt.backward_step(&w.sqr()?.sum_all()?);
    let kinds: [&dyn Fn() -> candle_grad_clip::Result<Sgd>; 2] = [&plain, &momentum];
    for (ours, others) in [(kinds[0], kinds[1]), (kinds[1], kinds[0])] {
        let mut opt = ours()?;
        step(&mut opt)?;
        opt.save(folder.join("o"))?;
        let start = w.as_detached_tensor().copy()?;
        let mut resumed = others()?;
        step(&mut resumed)?;
        resumed.load(folder.join("o"))?;
        let mut ends = Vec::new();
        for opt in [&mut opt, &mut resumed] {
            w.set(&start)?;
            step(opt)?;
            step(opt)?;
            ends.push(bits_of_vars(std::slice::from_ref(&w))?);
        }
        assert_eq!(ends[0], ends[1]);
    }
    Ok(())
}

#[test]
fn others_can_read_the_file() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o.safetensors");
    let map = model()?;
    let vars = NamedVars::from(&map);
    let mut opt = AdamW::from_named_vars(vars.clone(), adamw_params())?.master_weights(true);
    opt.step(&gradients(&vars, 3)?)?;
    opt.save(&path)?;
    let tensors = candle_core::safetensors::load(&path, device())?;
    let expected = |name: &str, dtype: DType, shape: &[usize]| {
        let tensor = &tensors[name];
        assert_eq!((tensor.dtype(), tensor.dims()), (dtype, shape), "{name}");
        tensor.clone()
    };
    let first = expected("layer0.f64.first_moment", DType::F64, &[5, 4]);
    let grad = gradients(&vars, 3)?
        .get(&map.data().lock().unwrap()["layer0.f64"])
        .unwrap()
        .clone();
    assert_eq!(
        first.to_vec2::<f64>()?,
        (grad * (1.0 - 0.9))?.to_vec2::<f64>()?
    );
    expected("layer0.f32.second_moment", DType::F32, &[5, 4]);
    expected("layer3.bf16.second_moment", DType::F32, &[2, 3, 2]);
    let master = expected("layer0.bf16.master", DType::F32, &[5, 4]);
    let weight = map.data().lock().unwrap()["layer0.bf16"].as_detached_tensor();
    assert_eq!(
        master
            .to_dtype(DType::BF16)?
            .to_dtype(DType::F32)?
            .to_vec2::<f32>()?,
        weight.to_dtype(DType::F32)?.to_vec2::<f32>()?
    );
    assert!(!tensors.contains_key("layer0.f32.master"));
    assert!(
        !tensors
            .keys()
            .any(|name| name.starts_with("layer6") || name.contains("max_second"))
    );
    Ok(())
}

#[test]
fn any_name_is_kept_but_not_two_of_one() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let names = [
        "a",
        "a.first_moment",
        "a.first_moment.master",
        "",
        ".",
        "__metadata__",
        "é\n\"\\\u{0}",
    ];
    let vars: Vec<Var> = names
        .iter()
        .map(|_| Var::new(&[1f32], device()))
        .collect::<candle_core::Result<_>>()?;
    let gradient = |i: usize| Tensor::new(&[i as f32], device());
    let grads: Vec<Tensor> = (0..vars.len())
        .map(gradient)
        .collect::<candle_core::Result<_>>()?;
    let named: Vec<(String, Var)> = names
        .iter()
        .zip(&vars)
        .map(|(name, var)| pair(name, var))
        .collect();
    let mut opt = AdamW::from_named_vars(named.clone(), ParamsAdamW::default())?;
    opt.step(&store_for(&vars, &grads))?;
    opt.save(&path)?;
    let before = fs::read(&path)?;
    let mut resumed = AdamW::from_named_vars(
        named.into_iter().rev().collect::<Vec<_>>(),
        ParamsAdamW::default(),
    )?;
    resumed.load(&path)?;
    let tensors = candle_core::safetensors::load(&path, device())?;
    let moment = |name: &str| tensors[&format!("{name}.first_moment")].to_vec1::<f32>();
    assert_eq!(moment("a.first_moment")?, [0.1f32]);

    let twice = vec![pair("a", &vars[0]), pair("a", &vars[1])];
    let mut opt = AdamW::from_named_vars(twice, ParamsAdamW::default())?;
    for error in [opt.save(&path).unwrap_err(), opt.load(&path).unwrap_err()] {
        assert!(
            error.to_string().contains("same name")
                || error.to_string().contains("two Vars are named \"a\""),
            "{error}"
        );
    }
    assert_eq!(fs::read(&path)?, before);
    Ok(())
}

#[test]
fn a_wrapper_saves_under_its_names_also_what_inner_mut_put_in() -> Result<()> {
    let folder = Folder::new()?;
    let (w, named) = small()?;
    let make = || Sgd::new(vec![w.clone()], momentum_params(true)); // w is var.0 here
    let mut opt = ClippedOptimizer::wrap(make()?, named.clone(), Clip::none())?;
    *opt.inner_mut() = make()?;
    opt.inner_mut().backward_step(&w.sqr()?.sum_all()?)?;
    opt.save(folder.join("o"))?;
    assert!(
        candle_core::safetensors::load(folder.join("o"), device())?
            .contains_key("w.momentum_buffer")
    );
    *opt.inner_mut() = make()?;
    opt.load(folder.join("o"))?;
    assert_eq!(opt.inner().steps(), 1);
    Ok(())
}

/// A Var that has taken fewer steps than the optimizer continues from its own number.
#[test]
fn each_vars_own_steps_come_back() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    let make = || -> Result<_> {
        let (a, b) = (Var::new(&[1f32], device())?, Var::new(&[1f32], device())?);
        let opt = AdamW::from_named_vars(vec![pair("a", &a), pair("b", &b)], adamw_params())?;
        Ok((a, b, opt))
    };
    let both = |a: &Var, b: &Var| -> candle_core::Result<Tensor> { a.sum_all()? + b.sum_all()? };
    let (a, b, mut opt) = make()?;
    for _ in 0..20 {
        opt.backward_step(&a.sum_all()?)?;
    }
    opt.backward_step(&both(&a, &b)?)?;
    opt.save(&path)?;
    let (x, y, mut resumed) = make()?;
    resumed.load(&path)?;
    x.set(&a)?;
    y.set(&b)?;
    for _ in 0..3 {
        opt.backward_step(&both(&a, &b)?)?;
        resumed.backward_step(&both(&x, &y)?)?;
    }
    assert_eq!((resumed.steps(), opt.steps()), (24, 24));
    assert_eq!(x.to_vec1::<f32>()?, a.to_vec1::<f32>()?);
    assert_eq!(y.to_vec1::<f32>()?, b.to_vec1::<f32>()?);
    // The other way would not show.
    let document = |bytes: &[u8], own: serde_json::Value| {
        checkpoints::edited(bytes, |_, document| document["vars"][1]["steps"] = own)
    };
    let bytes = fs::read(&path)?;
    for (own, said) in [(0, "0 steps"), (22, "22 steps")] {
        fs::write(&path, document(&bytes, own.into())?)?;
        let error = resumed.load(&path).unwrap_err().to_string();
        assert!(
            error.contains(&format!("\"b\" has taken {said}")),
            "{error}"
        );
    }
    // As a file from before, in which one counter served all: another second half.
    fs::write(&path, document(&bytes, serde_json::Value::Null)?)?;
    resumed.load(&path)?;
    Ok(())
}
