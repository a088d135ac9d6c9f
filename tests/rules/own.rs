//! Rules that users write.

use std::sync::{Arc, Mutex};

use support::device::{backends, device, kernels};

use anyhow::Result;
use candle_core::{DType, Var};
use candle_grad_clip::optim::{ParamGroup, ParamGroups, Sgd};
use candle_grad_clip::{
    Clip, ClipDecision, ClipRule, ClippedOptimizer, Error, GradNorms, LossScaler, NonFinite,
    SkipReason,
};
use candle_nn::Optimizer;
use support::checkpoints::Folder;
use support::gradients::values;

use super::{Gradients, fused, plain, random_history, step, store};

/// Returns what it is told, and keeps what it saw and observed.
#[derive(Clone)]
struct Told {
    decision: Arc<Mutex<ClipDecision>>,
    seen: Arc<Mutex<Vec<GradNorms>>>,
    observed: Arc<Mutex<Vec<f64>>>,
}

impl Told {
    fn new(decision: ClipDecision) -> Self {
        Self {
            decision: Arc::new(Mutex::new(decision)),
            seen: Arc::default(),
            observed: Arc::default(),
        }
    }

    fn tell(&self, decision: ClipDecision) {
        *self.decision.lock().unwrap() = decision;
    }

    fn observed(&self) -> Vec<f64> {
        self.observed.lock().unwrap().clone()
    }
}

impl ClipRule for Told {
    fn decide(&self, measured: &GradNorms) -> ClipDecision {
        self.seen.lock().unwrap().push(measured.clone());
        self.decision.lock().unwrap().clone()
    }

    fn observe(&mut self, measured: &GradNorms, decision: &ClipDecision) {
        assert_eq!(decision, &*self.decision.lock().unwrap());
        self.observed.lock().unwrap().push(measured.total_norm());
    }

    fn reads_loss(&self) -> bool {
        true
    }

    fn save(&self) -> Vec<f64> {
        self.observed()
    }

    fn load(&mut self, state: &[f64]) -> Result<(), String> {
        if state.len() > 3 {
            return Err("expected 3 numbers at most".to_string());
        }
        *self.observed.lock().unwrap() = state.to_vec();
        Ok(())
    }
}

/// Each of our own methods as a rule of the user's gives the same.
#[test]
fn decisions_do_what_the_clips_do() -> Result<()> {
    let cases: [(ClipDecision, Clip); 3] = [
        (ClipDecision::Clamp(0.3), Clip::value(0.3)),
        (ClipDecision::Keep, Clip::none()),
        (ClipDecision::Scale(1.0), Clip::none()),
    ];
    for (decision, clip) in cases {
        for backend in backends() {
            for policy in [NonFinite::SkipStep, NonFinite::Zero] {
                let none = Clip::none().non_finite(policy);
                let (named, opt) = plain(none.clone())?;
                let mut opt = opt.with_rule(Told::new(decision.clone()))?;
                let (named_fused, opt_fused) = fused(none)?;
                let mut opt_fused = opt_fused.with_rule(Told::new(decision.clone()))?;
                let (named_right, mut right) = plain(clip.clone().non_finite(policy))?;
                for (at, mut gradients) in random_history(1, 12).into_iter().enumerate() {
                    if at == 5 {
                        gradients[1] = Some(vec![f64::NAN]);
                    }
                    let (got, report) = step(&mut opt, &named, &gradients, backend)?;
                    let (of_fused, _) = step(&mut opt_fused, &named_fused, &gradients, backend)?;
                    let (expected, expected_report) =
                        step(&mut right, &named_right, &gradients, backend)?;
                    assert_eq!((&got, &of_fused), (&expected, &expected), "{clip}");
                    // (As text, in which NaN is itself.)
                    let (report, expected) =
                        (format!("{report:?}"), format!("{expected_report:?}"));
                    assert_eq!(report, expected, "{clip}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn scales_of_all_and_of_each() -> Result<()> {
    let told = Told::new(ClipDecision::Scale(0.5));
    let (named, opt) = fused(Clip::none())?;
    let mut opt = opt.with_rule(told.clone())?;
    let gradients: Gradients = vec![Some(vec![3.0, 0.0, 0.0]), Some(vec![4.0]), None];
    let (got, report) = step(&mut opt, &named, &gradients, kernels())?;
    assert_eq!((got[0][0], got[1][0]), (1.5, 2.0));
    assert_eq!(
        (report.clip_coef()?, report.record()?.clipped_norm),
        (0.5, 2.5)
    );
    told.tell(ClipDecision::ScaleEach(vec![2.0, 0.25, 0.0]));
    let (got, report) = step(&mut opt, &named, &gradients, kernels())?;
    assert_eq!((got[0][0], got[1][0]), (6.0, 1.0));
    assert_eq!(
        (report.clip_coef()?, report.record()?.clipped_norm),
        (0.25, 37f64.sqrt())
    );
    let seen = told.seen.lock().unwrap();
    let Some(last) = seen.last() else {
        panic!("nothing seen")
    };
    assert_eq!(
        (last.step(), last.total_norm(), last.loss()),
        (2, 5.0, None)
    );
    assert_eq!(last.param_norms(), [3.0, 4.0, 0.0]);
    assert_eq!(last.names(), ["layer0", "layer1", "layer2"]);
    Ok(())
}

#[test]
fn only_steps_that_were_taken_are_observed() -> Result<()> {
    let told = Told::new(ClipDecision::Keep);
    let (named, opt) = plain(Clip::none().max_skips(2))?;
    let mut opt = opt.with_rule(told.clone())?;
    let gradients: Gradients = vec![None, Some(vec![4.0]), None];
    let mut bad = gradients.clone();
    bad[1] = Some(vec![f64::NAN]);
    step(&mut opt, &named, &gradients, kernels())?;
    step(&mut opt, &named, &bad, kernels())?; // the rule is not asked
    assert_eq!(told.seen.lock().unwrap().len(), 1);
    told.tell(ClipDecision::Skip);
    let (got, report) = step(&mut opt, &named, &gradients, kernels())?;
    assert_eq!(report.record()?.skip_reason, Some(SkipReason::Rule));
    assert_eq!(got[1], [0.0]);
    let error = opt.step_report(&store(&named, &gradients)?).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooManySkips {
                reason: SkipReason::Rule,
                skips: 3,
                ..
            }
        ),
        "{error}"
    );
    for (decision, expected) in [
        (
            ClipDecision::Scale(f64::NAN),
            "a coefficient of the ClipRule is NaN",
        ),
        (
            ClipDecision::Scale(-1.0),
            "a coefficient of the ClipRule is -1",
        ),
        (
            ClipDecision::ScaleEach(vec![1.0, f64::INFINITY, 1.0]),
            "a coefficient of the ClipRule is inf",
        ),
        (
            ClipDecision::ScaleEach(vec![1.0; 2]),
            "the number of coefficients of the ClipRule is 2",
        ),
        (ClipDecision::Clamp(0.0), "the bound of the ClipRule is 0"),
        (
            ClipDecision::Clamp(f64::NAN),
            "the bound of the ClipRule is NaN",
        ),
    ] {
        told.tell(decision);
        let error = opt.step_report(&store(&named, &gradients)?).unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
        assert_eq!(values(&named[1].1)?, [0.0]);
    }
    assert_eq!(told.observed(), [4.0]);
    Ok(())
}

#[test]
fn the_loss_is_handed_on() -> Result<()> {
    let told = Told::new(ClipDecision::Keep);
    let w = Var::zeros(1, DType::F32, device())?;
    let sgd = Sgd::from_named_vars(vec![w.clone()], 0.0)?;
    let opt = ClippedOptimizer::wrap(sgd, vec![w.clone()], Clip::none())?;
    let mut opt = opt
        .with_rule(told.clone())?
        .with_loss_scaler(LossScaler::default())?;
    opt.backward_step(&(w.sum_all()? + 2.5)?)?;
    opt.step_report_with_loss(&opt.scale_loss(&w.sum_all()?)?.backward()?, 7.0)?;
    // An overflow is the scaler's, and the rule is not asked.
    opt.backward_step(&(w.sum_all()? * f64::INFINITY)?)?;
    let seen = told.seen.lock().unwrap();
    let losses: Vec<_> = seen.iter().map(GradNorms::loss).collect();
    assert_eq!(losses, [Some(2.5), Some(7.0)]);
    Ok(())
}

#[test]
fn it_stands_alone() -> Result<()> {
    let told = Told::new(ClipDecision::Keep);
    let (_, opt) = plain(Clip::norm(1.0))?;
    let error = opt.with_rule(told.clone()).unwrap_err().to_string();
    assert!(
        error.contains("clip `norm:1`: a ClipRule decides here"),
        "{error}"
    );
    let (_, opt) = plain(Clip::none())?;
    let mut opt = opt.with_rule(told.clone())?;
    assert!(opt.set_clip(Clip::norm(1.0)).is_err());
    opt.set_clip(Clip::none().max_skips(3))?;
    // Groups may have limits of their own, beside a scale.
    let group = ParamGroup::new("first", &["layer0"]).max_norm(1.0);
    let (named, opt) = fused(Clip::none())?;
    let opt = opt.with_rule(told.clone())?;
    let mut opt = opt.with_param_groups(ParamGroups::new(vec![group])?)?;
    told.tell(ClipDecision::Scale(0.5));
    let gradients: Gradients = vec![Some(vec![4.0, 0.0, 0.0]), Some(vec![4.0]), None];
    let (got, _) = step(&mut opt, &named, &gradients, kernels())?;
    assert!(
        (got[0][0] - 1.0).abs() < 1e-6 && got[1][0] == 2.0,
        "{got:?}"
    );
    told.tell(ClipDecision::Clamp(0.5));
    let error = opt.step_report(&store(&named, &gradients)?).unwrap_err();
    assert!(
        error.to_string().contains("no Clamp beside groups"),
        "{error}"
    );
    Ok(())
}

#[test]
fn its_state_is_in_checkpoints() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    let told = Told::new(ClipDecision::Keep);
    let (named, opt) = fused(Clip::none())?;
    let mut opt = opt.with_rule(told.clone())?;
    let gradients: Gradients = vec![None, Some(vec![4.0]), None];
    step(&mut opt, &named, &gradients, kernels())?;
    step(&mut opt, &named, &gradients, kernels())?;
    opt.save(&path)?;
    let make = || {
        let inner = Sgd::from_named_vars(named.clone(), 1.0)?;
        ClippedOptimizer::wrap(inner, named.clone(), Clip::none())
    };
    let other = Told::new(ClipDecision::Keep);
    let mut resumed = make()?.with_rule(other.clone())?;
    resumed.load(&path)?;
    assert_eq!(other.observed(), [4.0, 4.0]);
    assert_eq!(
        step(&mut resumed, &named, &gradients, kernels())?.1.step(),
        3
    );
    // Without the rule, or with one that does not take it: nothing is changed.
    let error = make()?.load(&path).unwrap_err().to_string();
    assert!(error.contains("it has the state of a ClipRule"), "{error}");
    step(&mut opt, &named, &gradients, kernels())?;
    step(&mut opt, &named, &gradients, kernels())?;
    opt.save(&path)?;
    let error = resumed.load(&path).unwrap_err().to_string();
    assert!(error.contains("expected 3 numbers at most"), "{error}");
    assert_eq!(other.observed().len(), 3);
    assert_eq!(
        step(&mut resumed, &named, &gradients, kernels())?.1.step(),
        4
    );
    // A file of a wrapper with its own clip.
    let (_, plain) = fused(Clip::norm(1.0))?;
    plain.save(&path)?;
    let error = resumed.load(&path).unwrap_err().to_string();
    assert!(error.contains("a ClipRule decides here"), "{error}");
    // What JSON can't hold is not written.
    told.observed.lock().unwrap().push(f64::NAN);
    let error = opt.save(&path).unwrap_err().to_string();
    assert!(error.contains("the ClipRule's state has NaN"), "{error}");
    Ok(())
}
