//! Steps that are skipped for their loss.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{Clip, ClippedOptimizer, Error, LossScaler, SkipReason, SkipSteps};
use candle_nn::{Optimizer, SGD};
use support::checkpoints::Folder;
use support::device::{device, kernels};

use super::{plain, random_history, step, store};

fn clip(text: &str) -> Clip {
    text.parse::<Clip>().unwrap().max_skips(1000)
}

/// The rule once more, over all losses of steps that were taken.
#[derive(Default)]
struct Formula {
    losses: Vec<f64>,
}

impl Formula {
    fn skips(&mut self, loss: f64, z: f64, window: usize) -> bool {
        let start = self.losses.len().saturating_sub(window);
        let last = &self.losses[start..];
        let n = last.len() as f64;
        let mean = last.iter().sum::<f64>() / n;
        let variance = last.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let skips = last.len() >= (window / 2).max(2) && loss - mean > z * variance.sqrt();
        if !skips && loss.is_finite() {
            self.losses.push(loss);
        }
        skips
    }
}

#[test]
fn random_histories_agree_with_the_formula() -> Result<()> {
    let mut skipped = 0;
    for seed in 0..120 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (named, mut opt) = plain(clip("skip:loss_z=2,window=8"))?;
        let mut formula = Formula::default();
        for (at, gradients) in random_history(seed, 40).into_iter().enumerate() {
            let loss = match rng.usize(0..12) {
                0 => 50.0 * rng.f64(),
                1 => f64::NAN,
                2 => f64::INFINITY,
                _ => rng.f64() - 0.5,
            };
            let report = opt.step_report_with_loss(&store(&named, &gradients)?, loss)?;
            let expected = formula.skips(loss, 2.0, 8).then_some(SkipReason::LargeLoss);
            assert_eq!(
                report.record()?.skip_reason,
                expected,
                "{seed}, {at}, loss {loss}"
            );
            skipped += u32::from(report.skipped()?);
        }
    }
    assert!(skipped > 300, "{skipped}");
    Ok(())
}

/// A weight at 0 whose loss is a given number and whose gradient is 1.
fn loss_of(w: &Var, loss: f64) -> Result<Tensor> {
    Ok((w.sum_all()? + loss)?)
}

/// OLMo-core's: window 2, one deviation; the second loss is 1e9 and is skipped, the next normal one
/// is taken. (Here the rule waits for two losses.)
#[test]
fn olmo_skips_a_loss_and_goes_on() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        let w = Var::zeros(1, dtype, device())?;
        let sgd = SGD::new(vec![w.clone()], 0.0)?;
        let mut opt = ClippedOptimizer::wrap(sgd, vec![w.clone()], clip("skip:loss_z=1,window=2"))?;
        for (loss, skipped) in [
            (2.0, false),
            (2.5, false),
            (1e9, true),
            (2.2, false),
            (1e9, true),
        ] {
            let report = opt.backward_step_report(&loss_of(&w, loss)?)?;
            assert_eq!(report.skipped()?, skipped, "{loss}");
        }
    }
    Ok(())
}

#[test]
fn either_of_norm_and_loss_skips() -> Result<()> {
    let (named, mut opt) = plain(clip("skip:z=3,loss_z=3,window=4"))?;
    let gradients = |norm: f64| vec![Some(vec![norm, 0.0, 0.0]), None, None];
    let mut step = |norm, loss| -> Result<_> {
        let store = store(&named, &gradients(norm))?;
        Ok(opt
            .step_report_with_loss(&store, loss)?
            .record()?
            .skip_reason)
    };
    for (norm, loss) in [(1.0, 1.0), (1.1, 1.1), (1.0, 0.9)] {
        assert_eq!(step(norm, loss)?, None);
    }
    assert_eq!(step(9.0, 1.0)?, Some(SkipReason::LargeNorm));
    assert_eq!(step(1.0, 9.0)?, Some(SkipReason::LargeLoss));
    assert_eq!(step(1.0, 1.0)?, None);
    Ok(())
}

#[test]
fn without_a_loss_the_norm_decides_alone() -> Result<()> {
    let (named, mut opt) = plain(clip("skip:loss_z=1,window=2"))?;
    for gradients in random_history(1, 20) {
        assert!(!step(&mut opt, &named, &gradients, kernels())?.1.skipped()?);
    }
    // Nothing of these entered the losses: the rule still waits for two.
    let grads = store(&named, &random_history(2, 1)[0])?;
    for (loss, skipped) in [(1.0, false), (1e9, false), (1e12, true)] {
        assert_eq!(
            opt.step_report_with_loss(&grads, loss)?.skipped()?,
            skipped,
            "{loss}"
        );
    }
    Ok(())
}

#[test]
fn the_loss_is_the_one_without_a_scale() -> Result<()> {
    let w = Var::zeros(1, DType::F32, device())?;
    let sgd = Sgd::from_named_vars(vec![w.clone()], 0.0)?;
    let opt = ClippedOptimizer::wrap(sgd, vec![w.clone()], clip("skip:loss_z=5,window=4"))?;
    let mut opt = opt.with_loss_scaler(LossScaler::default().growth_interval(1))?;
    for loss in [1.0, 1.5, 1.2, 1.4, 1.1] {
        assert!(!opt.backward_step_report(&loss_of(&w, loss)?)?.skipped()?); // while the scale doubles
    }
    assert!(opt.backward_step_report(&loss_of(&w, 10.0)?)?.skipped()?);
    Ok(())
}

#[test]
fn errors() -> Result<()> {
    let w = Var::zeros(3, DType::F32, device())?;
    let make =
        |clip| ClippedOptimizer::wrap(SGD::new(vec![w.clone()], 0.1)?, vec![w.clone()], clip);
    let vector = (w.as_tensor() + 1.0)?;
    let mut opt = make(clip("skip:loss_z=1"))?;
    let error = opt.backward_step_report(&vector).unwrap_err();
    assert!(
        matches!(error, Error::LossShape { ref shape } if shape == &[3]),
        "{error}"
    );
    assert!(
        !make(clip("skip:z=1"))?
            .backward_step_report(&vector)?
            .skipped()?
    );
    let mut opt = make(clip("skip:loss_z=1,window=2").max_skips(1))?;
    let loss = |loss: f64| w.sum_all()? + loss;
    opt.backward_step_report(&loss(1.0)?)?;
    opt.backward_step_report(&loss(2.0)?)?;
    assert!(opt.backward_step_report(&loss(9.0)?)?.skipped()?);
    let error = opt.backward_step_report(&loss(9.0)?).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooManySkips {
                reason: SkipReason::LargeLoss,
                skips: 2,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("skip:loss_z=1"), "{error}");
    Ok(())
}

#[test]
fn losses_are_in_checkpoints() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    let w = Var::zeros(1, DType::F32, device())?;
    let vars = vec![("w".to_string(), w.clone())];
    let make =
        |clip| ClippedOptimizer::wrap(Sgd::from_named_vars(vars.clone(), 0.0)?, vars.clone(), clip);
    let mut opt = make(clip("skip:loss_z=3,window=4"))?;
    for loss in [-1.0, -1.2, -1.1] {
        opt.backward_step(&loss_of(&w, loss)?)?;
    }
    opt.save(&path)?;
    let mut resumed = make(Clip::none())?;
    resumed.load(&path)?;
    assert!(
        resumed
            .backward_step_report(&loss_of(&w, 0.0)?)?
            .skipped()?
    );
    assert!(
        !resumed
            .backward_step_report(&loss_of(&w, -1.0)?)?
            .skipped()?
    );
    Ok(())
}

#[test]
fn as_text() {
    let both = SkipSteps {
        loss_z: 6.0,
        ..SkipSteps::default()
    };
    assert_eq!("skip:loss_z=6".parse::<Clip>().unwrap(), both.into());
    assert_eq!(Clip::from(both).to_string(), "skip:loss_z=6");
    let both = SkipSteps { z: 6.0, ..both };
    assert_eq!(Clip::from(both).to_string(), "skip:z=6,loss_z=6");
    let error = "skip:loss_z=0".parse::<Clip>().unwrap_err();
    assert!(error.to_string().starts_with("loss_z is 0"), "{error}");
}
