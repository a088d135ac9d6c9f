//! A limit that is a function of the step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use candle_grad_clip::{Clip, ClippedOptimizer, Error, NonFinite, StepPath};
use candle_nn::Optimizer;
use support::checkpoints::Folder;
use support::device::kernels;
use support::gradients::{loss_with_gradients, without_names};
use support::oracle::assert_all_close;

use super::{Named, SIZES, fused, plain, random_history, step};

fn warm_up(step: u64) -> f64 {
    0.1 + 0.05 * step.min(20) as f64
}

/// The same as another clip in each step.
fn as_set_by_hand<O: Optimizer + 'static>(
    make: impl Fn(Clip) -> Result<(Named, ClippedOptimizer<O>)>,
    clip: impl Fn(f64) -> Clip,
) -> Result<()> {
    let (named, opt) = make(clip(7.0))?;
    let mut opt = opt.with_max_norm_schedule(warm_up)?;
    let (named_by_hand, mut by_hand) = make(clip(7.0))?;
    for (at, gradients) in random_history(3, 30).into_iter().enumerate() {
        let now = clip(warm_up(at as u64 + 1));
        by_hand.set_clip(now.clone())?;
        let (got, report) = step(&mut opt, &named, &gradients, kernels())?;
        let (right, _) = step(&mut by_hand, &named_by_hand, &gradients, kernels())?;
        assert_eq!(got, right, "{now}, {at}");
        assert_eq!(opt.clip(), &now);
        assert_eq!(report.step(), at as u64 + 1);
    }
    Ok(())
}

#[test]
fn the_limit_of_each_step_is_that_of_the_function() -> Result<()> {
    for text in [
        "norm:LIMIT",
        "param-norm:LIMIT",
        "value:LIMIT",
        "block-rms:LIMIT",
        "zclip:warmup=5,max_norm=LIMIT",
        "skip:z=5,window=8,max_norm=LIMIT",
        "value:0.5+norm:LIMIT",
        "skip:z=5,window=8+norm:LIMIT",
        "zclip:warmup=5+param-norm:LIMIT",
    ] {
        let clip = |limit: f64| text.replace("LIMIT", &limit.to_string()).parse().unwrap();
        as_set_by_hand(plain, clip)?;
        as_set_by_hand(fused, clip)?;
    }
    Ok(())
}

#[test]
fn a_limit_that_is_none_is_an_error_and_changes_nothing() -> Result<()> {
    for bad in [0.0, -1.0, f64::NAN] {
        let (named, opt) = plain(Clip::norm(1.0))?;
        let limit = move |step| if step == 2 { bad } else { 1.0 };
        let mut opt = opt.with_max_norm_schedule(limit)?;
        let history = random_history(1, 2);
        step(&mut opt, &named, &history[0], kernels())?;
        let error = step(&mut opt, &named, &history[1], kernels()).unwrap_err();
        let error = error.downcast_ref::<Error>();
        assert!(
            matches!(
                error,
                Some(Error::InvalidOption {
                    name: "max_norm",
                    ..
                })
            ),
            "{error:?}"
        );
        assert_eq!(opt.last_report().unwrap().step(), 1);
        assert!(named.iter().all(|(_, var)| {
            let sum = var.abs().and_then(|x| x.sum_all()?.to_scalar::<f64>());
            sum.is_ok_and(|sum| sum == 0.0)
        }));
    }
    Ok(())
}

#[test]
fn a_clip_without_one_limit_is_refused() -> Result<()> {
    for (text, expected) in [
        ("none", "has no limit"),
        ("auto", "has no limit"),
        ("agc", "has no limit"),
        ("norm:1+param-norm:2", "more than one limit"),
        ("skip:z=2+value:1", "`value` after `skip`"),
    ] {
        let (_, opt) = plain(text.parse()?)?;
        let error = opt.with_max_norm_schedule(warm_up).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
    let (_, opt) = plain(Clip::norm(1.0))?;
    let mut opt = opt.with_max_norm_schedule(warm_up)?;
    assert!(opt.set_clip(Clip::none()).is_err());
    opt.set_clip(Clip::param_norm(1.0))?;
    Ok(())
}

/// Skipped steps count, and a resumed run goes on at its step.
#[test]
fn it_resumes_by_the_step() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    let history = random_history(5, 24);
    let (named, opt) = fused(Clip::norm(1.0))?;
    let mut whole = opt.with_max_norm_schedule(warm_up)?;
    let (named_first, opt) = fused(Clip::norm(1.0))?;
    let mut opt = opt.with_max_norm_schedule(warm_up)?;
    for (at, gradients) in history.iter().enumerate() {
        let mut gradients = gradients.clone();
        if at == 3 {
            gradients[1] = Some(vec![f64::NAN]);
        }
        if at == 12 {
            opt.save(&path)?;
            let (_, other) = fused(Clip::norm(5.0))?;
            drop(other);
            let inner = candle_grad_clip::optim::Sgd::from_named_vars(named_first.clone(), 1.0)?;
            let other = ClippedOptimizer::wrap(inner, named_first.clone(), Clip::norm(5.0))?;
            opt = other.with_max_norm_schedule(warm_up)?;
            opt.load(&path)?;
        }
        let (right, report) = step(&mut whole, &named, &gradients, kernels())?;
        let (got, resumed) = step(&mut opt, &named_first, &gradients, kernels())?;
        assert_all_close(&got.concat(), &right.concat(), 0.0, "resumed");
        assert_eq!(resumed.step(), report.step());
    }
    Ok(())
}

/// A function that counts its calls, and a limit that tells which call it was.
fn counting() -> (Arc<AtomicU64>, impl Fn(u64) -> f64 + Send + Sync) {
    let calls = Arc::new(AtomicU64::new(0));
    let seen = calls.clone();
    let limit = move |_| 1.0 / (seen.fetch_add(1, Ordering::Relaxed) + 1) as f64;
    (calls, limit)
}

#[test]
fn the_function_is_called_once_a_step_on_every_path() -> Result<()> {
    fn promise<O: Optimizer + 'static>(
        make: impl Fn(Clip) -> Result<(Named, ClippedOptimizer<O>)>,
        path: StepPath,
    ) -> Result<()> {
        let good: Vec<_> = SIZES.iter().map(|n| Some(vec![3.0; *n])).collect();
        let mut bad = good.clone();
        bad[1] = Some(vec![f64::NAN]);
        for strict in [false, true] {
            let mut clip = Clip::norm(7.0);
            if strict {
                clip = clip.non_finite(NonFinite::Error);
            }
            let (named, opt) = make(clip)?;
            let (calls, limit) = counting();
            let mut opt = opt.with_max_norm_schedule(limit)?;
            let mut expected = 0;
            for (at, gradients) in [&good, &bad, &good].into_iter().enumerate() {
                let result = step(&mut opt, &named, gradients, kernels());
                expected += 1;
                assert_eq!(calls.load(Ordering::Relaxed), expected, "{path:?}");
                let mut now = Clip::norm(1.0 / expected as f64);
                if strict {
                    now = now.non_finite(NonFinite::Error);
                }
                assert_eq!(opt.clip(), &now);
                match result {
                    Ok((_, report)) if at == 1 => assert!(report.skipped()?),
                    Ok((_, report)) => assert_eq!(report.path(), path),
                    Err(_) => assert!(strict && at == 1),
                }
            }
            let before = without_names(&named);
            let tensors: Vec<_> = before
                .iter()
                .map(|var| var.ones_like())
                .collect::<candle_core::Result<_>>()?;
            opt.backward_step(&loss_with_gradients(&before, &tensors)?)?;
            assert_eq!(
                calls.load(Ordering::Relaxed),
                expected + 1,
                "{path:?}, backward_step"
            );
        }
        Ok(())
    }
    promise(plain, StepPath::Copied)?;
    promise(fused, StepPath::Fused)
}
