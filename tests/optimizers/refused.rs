//! What a fused optimizer refuses, and that a step it does not take changes nothing.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::backend;
use candle_grad_clip::optim::{AdamW, ParamsSgd, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NonFinite};
use candle_nn::{Optimizer, ParamsAdamW};
use support::device::{backends, device};
use support::gradients::{bits_of_vars, store_for, tensor, values};

use super::fused::{gradients, vars};

#[test]
fn a_step_that_fails_or_is_skipped_changes_nothing() -> Result<()> {
    for backend in backends() {
        let vars = vars(DType::F32)?;
        let same = self::vars(DType::F32)?;
        let params = ParamsAdamW::default();
        let clip = Clip::norm(1.0);
        let make = |vars: &[Var]| -> Result<ClippedOptimizer<AdamW>> {
            let opt = AdamW::new(vars.to_vec(), params.clone())?;
            Ok(ClippedOptimizer::wrap(opt, vars.to_vec(), clip.clone())?)
        };
        let (mut opt, mut undisturbed) = (make(&vars)?, make(&same)?);
        backend::with_backend(backend, || -> Result<()> {
            for step in 0..6 {
                let good = gradients(step + 5 * step, DType::F32)?;
                let mut bad = good.clone();
                bad[4] = (&bad[4] / 0.0)?;
                assert!(opt.step_report(&store_for(&vars, &bad))?.skipped()?);
                opt.set_clip(clip.clone().non_finite(NonFinite::Error))?;
                let error = opt.step_report(&store_for(&vars, &bad)).unwrap_err();
                assert!(matches!(error, Error::NonFinite { .. }), "{error}");
                opt.set_clip(clip.clone())?;
                bad[4] = Tensor::zeros(3, DType::F32, device())?;
                let error = opt.step_report(&store_for(&vars, &bad)).unwrap_err();
                assert!(matches!(error, Error::Mismatch { .. }), "{error}");
                opt.set_learning_rate(f64::NAN);
                let error = opt.step_report(&store_for(&vars, &good)).unwrap_err();
                assert!(error.to_string().starts_with("lr is NaN"), "{error}");
                opt.set_learning_rate(params.lr);

                assert_eq!(opt.inner().steps(), step);
                opt.step(&store_for(&vars, &good))?;
                undisturbed.step(&store_for(&same, &good))?;
                assert_eq!(bits_of_vars(&vars)?, bits_of_vars(&same)?, "{backend:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn bad_hyper_parameters_are_refused_by_name() -> Result<()> {
    let adamw = |edit: fn(&mut ParamsAdamW)| {
        let mut params = ParamsAdamW::default();
        edit(&mut params);
        AdamW::from_named_vars(Vec::<Var>::new(), params)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert!(adamw(|p| p.lr = -1.0).starts_with("lr is -1"));
    assert!(adamw(|p| p.beta1 = 1.0).starts_with("beta1 is 1"));
    assert!(adamw(|p| p.beta2 = f64::NAN).starts_with("beta2 is NaN"));
    assert!(adamw(|p| p.eps = -1e-9).starts_with("eps is"));
    assert!(adamw(|p| p.weight_decay = f64::INFINITY).starts_with("weight_decay is inf"));
    let sgd = |params: ParamsSgd| {
        Sgd::from_named_vars(Vec::<Var>::new(), params)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    let params = ParamsSgd {
        nesterov: true,
        ..ParamsSgd::default()
    };
    assert!(sgd(params).contains("Nesterov"));
    let dampened = ParamsSgd {
        momentum: 0.5,
        dampening: 0.1,
        ..params
    };
    assert!(sgd(dampened).contains("Nesterov"));
    assert!(sgd(f64::NAN.into()).starts_with("lr is NaN"));
    let mut opt = Sgd::new_lr(Vec::new(), 0.1)?;
    let with_momentum = ParamsSgd {
        momentum: 0.5,
        ..ParamsSgd::from(0.1)
    };
    assert!(opt.set_params(with_momentum).is_err());
    assert_eq!(opt.params(), &ParamsSgd::from(0.1));
    Ok(())
}

#[test]
fn numbers_out_of_range_are_refused_however_they_come() -> Result<()> {
    let refused = |params: ParamsSgd| {
        let named = Sgd::from_named_vars(Vec::<Var>::new(), params).map(|_| ());
        let mut opt = Sgd::from_named_vars(
            Vec::<Var>::new(),
            ParamsSgd {
                momentum: 0.5,
                ..ParamsSgd::default()
            },
        )
        .unwrap();
        let before = *opt.params();
        let set = opt.set_params(params);
        assert_eq!(opt.params(), &before);
        let (named, set) = (named.unwrap_err(), set.unwrap_err());
        assert_eq!(named.to_string(), set.to_string());
        named.to_string()
    };
    let momentum = ParamsSgd {
        momentum: 0.5,
        ..ParamsSgd::default()
    };
    for dampening in [5.0, 1.0 + f64::EPSILON, -0.1, f64::NAN, f64::INFINITY] {
        let error = refused(ParamsSgd {
            dampening,
            ..momentum
        });
        assert!(error.starts_with("dampening is"), "{error}");
    }
    let bad = |edit: fn(&mut ParamsSgd)| {
        let mut params = momentum;
        edit(&mut params);
        params
    };
    for (name, bad) in [
        ("lr", bad(|p| p.lr = -0.1)),
        ("momentum", bad(|p| p.momentum = -0.1)),
        ("weight_decay", bad(|p| p.weight_decay = f64::NAN)),
    ] {
        let error = refused(bad);
        assert!(error.starts_with(&format!("{name} is")), "{error}");
    }
    let all = ParamsSgd {
        dampening: 1.0,
        ..momentum
    };
    Sgd::from_named_vars(Vec::<Var>::new(), all)?; // as in PyTorch
    Ok(())
}

/// A learning rate is checked by the step, which changes nothing.
#[test]
fn a_learning_rate_out_of_range_is_refused_by_the_step() -> Result<()> {
    let w = Var::from_tensor(&tensor(&[1.0], 1, DType::F32)?)?;
    let vars = vec![w.clone()];
    let grads = store_for(&vars, &[tensor(&[1.0], 1, DType::F32)?]);
    let wrapped = |opt| ClippedOptimizer::wrap(opt, vars.clone(), Clip::norm(1.0));
    let mut adamw = wrapped(AdamW::new_lr(vars.clone(), 0.1)?)?;
    let momentum = ParamsSgd {
        momentum: 0.5,
        ..ParamsSgd::default()
    };
    let sgd = Sgd::new(vars.clone(), momentum)?;
    let mut sgd = ClippedOptimizer::wrap(sgd, vars.clone(), Clip::norm(1.0))?;
    for lr in [f64::NAN, -1.0, f64::INFINITY, 1e39] {
        adamw.set_learning_rate(lr);
        sgd.set_learning_rate(lr);
        for error in [adamw.step(&grads), sgd.step(&grads)] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains("lr is"), "{error}");
        }
        assert_eq!((adamw.inner().steps(), sgd.inner().steps()), (0, 0));
        assert_eq!(values(&w)?, [1.0]);
    }
    // Each is fine, their product is not; and an eps that is infinite in f32 would freeze.
    let mut opt = AdamW::new_lr(vars.clone(), 1e30)?;
    opt.set_params(ParamsAdamW {
        lr: 1e30,
        weight_decay: 1e30,
        ..ParamsAdamW::default()
    });
    let error = opt.step(&grads).unwrap_err().to_string();
    assert!(error.contains("lr times weight_decay is"), "{error}");
    opt.set_params(ParamsAdamW {
        eps: 1e39,
        ..ParamsAdamW::default()
    });
    let error = opt.step(&grads).unwrap_err().to_string();
    assert!(error.contains("eps is"), "{error}");
    assert_eq!(values(&w)?, [1.0]);
    Ok(())
}
