//! Two shapes of real programs, written on top of the public API: a struct around an optimizer with
//! a limit that changes, and a loop that keeps the optimizer's state by name.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Clip, ClippedOptimizer, Error, SkipReason};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use support::checkpoints::Folder;
use support::gradients::{all_values_of_vars, bits_of_vars, random_values, tensor, values};
use support::net::Net;
use support::oracle::assert_all_close;

fn params() -> ParamsAdamW {
    ParamsAdamW {
        lr: 0.02,
        ..ParamsAdamW::default()
    }
}

fn net() -> Result<Net> {
    Ok(Net::new(DType::F32, 3, 8, 0.5)?)
}

/// The loss of step `at`, scaled by `size`.
fn loss(net: &Net, at: u64, size: f64) -> Result<Tensor> {
    let x = tensor(&random_values(12, 70 + at), (4, 3), DType::F32)?;
    Ok((net.errors(&x, &x.sum_keepdim(1)?)?.mean_all()? * size)?)
}

/// The optimizer of a reinforcement-learning policy: the limit can be changed, or taken away.
struct PolicyOptimizer {
    opt: ClippedOptimizer<AdamW>,
}

impl PolicyOptimizer {
    fn new(varmap: &VarMap, params: ParamsAdamW, max_grad_norm: Option<f64>) -> Result<Self> {
        let opt = AdamW::from_named_vars(varmap, params)?;
        let opt = ClippedOptimizer::wrap(opt, varmap, clip(max_grad_norm))?;
        Ok(Self { opt })
    }

    fn set_max_grad_norm(&mut self, max_grad_norm: Option<f64>) -> Result<()> {
        Ok(self.opt.set_clip(clip(max_grad_norm))?)
    }

    fn set_lr(&mut self, lr: f64) {
        self.opt.set_learning_rate(lr);
    }

    /// Takes a step, and returns the norm before clipping.
    fn update(&mut self, loss: &Tensor) -> Result<f64> {
        let report = self.opt.backward_step_report(loss)?;
        ensure!(!report.skipped()?, "the gradients are not finite");
        Ok(report.total_norm()?)
    }
}

fn clip(max_grad_norm: Option<f64>) -> Clip {
    max_grad_norm.map_or(Clip::none(), Clip::norm)
}

#[test]
fn a_limit_that_changes_or_goes_away() -> Result<()> {
    let (net, theirs) = (net()?, net()?);
    let vars = |net: &Net| candle_grad_clip::NamedVars::from(&net.map).vars().to_vec();
    let mut policy = PolicyOptimizer::new(&net.map, params(), None)?;
    // Without a limit: candle's AdamW, to the bit.
    let mut candle = candle_nn::AdamW::new(vars(&theirs), params())?;
    for at in 0..3 {
        policy.update(&loss(&net, at, 1.0)?)?;
        candle.backward_step(&loss(&theirs, at, 1.0)?)?;
    }
    assert_eq!(bits_of_vars(&vars(&net))?, bits_of_vars(&vars(&theirs))?);
    for limit in [0.5, 0.01] {
        policy.set_max_grad_norm(Some(limit))?;
        let norm = policy.update(&loss(&net, 3, 10.0)?)?;
        let record = policy.opt.last_report().unwrap().record()?;
        assert!(norm > limit && record.clipped_norm <= limit);
        assert_eq!(record.total_norm, norm);
    }
    // A limit that would freeze the model is refused, and the old one stays.
    let error = policy.set_max_grad_norm(Some(0.0)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("Clip::none() turns clipping off")
    );
    assert_eq!(policy.opt.clip(), &Clip::norm(0.01));
    // A bad batch changes nothing.
    let before = bits_of_vars(&vars(&net))?;
    policy.update(&loss(&net, 4, f64::NAN)?).unwrap_err();
    let reason = policy.opt.last_report().unwrap().record()?.skip_reason;
    assert_eq!(reason, Some(SkipReason::NonFinite));
    assert_eq!(bits_of_vars(&vars(&net))?, before);
    policy.set_lr(0.0);
    policy.set_max_grad_norm(None)?;
    policy.update(&loss(&net, 5, 1.0)?)?;
    assert_eq!(bits_of_vars(&vars(&net))?, before);
    Ok(())
}

/// A trainer that hands out its optimizer's state by name and takes it back. The library's form of
/// a state is a file, and any reader of safetensors gives the tensors in it.
struct Trainer {
    opt: ClippedOptimizer<AdamW>,
    file: PathBuf,
}

/// What `state` returns: the moments by name, to look at, and the file, to restore.
struct State {
    tensors: BTreeMap<String, Tensor>,
    file: Vec<u8>,
    weights: HashMap<String, Tensor>,
}

impl Trainer {
    fn new(net: &Net, clip: Clip, file: PathBuf) -> Result<Self> {
        let opt = AdamW::from_named_vars(&net.map, params())?;
        let opt = ClippedOptimizer::wrap(opt, &net.map, clip)?;
        Ok(Self { opt, file })
    }

    fn state(&self) -> Result<State> {
        self.opt.save(&self.file)?;
        let tensors = candle_core::safetensors::load(&self.file, &Device::Cpu)?;
        let vars = self.opt.vars();
        let named = vars.names().iter().zip(vars.vars());
        let weight = |(name, var): (&String, &candle_core::Var)| Ok((name.clone(), var.copy()?));
        Ok(State {
            tensors: tensors.into_iter().collect(),
            file: std::fs::read(&self.file)?,
            weights: named.map(weight).collect::<Result<_>>()?,
        })
    }

    fn restore(&mut self, state: &State) -> Result<()> {
        std::fs::write(&self.file, &state.file)?;
        self.opt.load(&self.file)?;
        let vars = self.opt.vars();
        for (name, var) in vars.names().iter().zip(vars.vars()) {
            var.set(state.weights.get(name).context("a Var without a weight")?)?;
        }
        Ok(())
    }

    fn steps_taken(&self) -> Result<u64> {
        Ok(self.opt.steps_taken()?)
    }
}

#[test]
fn a_loop_that_keeps_its_state_by_name() -> Result<()> {
    let folder = Folder::in_memory()?;
    let net_one = net()?;
    let mut trainer = Trainer::new(&net_one, Clip::autoclip(40.0), folder.join("one"))?;
    assert!(trainer.state()?.tensors.is_empty(), "no step, no moments");
    let first = loss(&net_one, 0, 1.0)?;
    let grads = first.backward()?;
    let before = trainer.state()?;
    trainer.opt.backward_step(&first)?;
    // After one step the moments are (1 - beta) times the gradient, and its square.
    let state = trainer.state()?;
    assert_eq!(trainer.steps_taken()?, 1);
    let vars = trainer.opt.vars().clone();
    for (name, var) in vars.names().iter().zip(vars.vars()) {
        let grad = values(grads.get(var).context("a gradient")?)?;
        let moment = |of: &str| values(&state.tensors[&format!("{name}.{of}")]);
        let first: Vec<f64> = grad.iter().map(|g| 0.1 * g).collect();
        let second: Vec<f64> = grad.iter().map(|g| 0.001 * g * g).collect();
        // (AutoClip's first limit is the norm itself, up to its eps.)
        assert_all_close(&moment("first_moment")?, &first, 1e-5, name);
        assert_all_close(&moment("second_moment")?, &second, 1e-5, name);
    }
    for at in 1..4 {
        trainer.opt.backward_step(&loss(&net_one, at, 1.0)?)?;
    }
    let end = all_values_of_vars(vars.vars())?;

    // Back to the first step, in the same process and in another trainer.
    let net_two = net()?;
    let mut other = Trainer::new(&net_two, Clip::none(), folder.join("two"))?;
    other.restore(&state)?;
    trainer.restore(&state)?;
    assert_eq!((other.steps_taken()?, trainer.steps_taken()?), (1, 1));
    for at in 1..4 {
        trainer.opt.backward_step(&loss(&net_one, at, 1.0)?)?;
        other.opt.backward_step(&loss(&net_two, at, 1.0)?)?;
    }
    assert_eq!(all_values_of_vars(vars.vars())?, end);
    assert_eq!(all_values_of_vars(other.opt.vars().vars())?, end);
    assert_eq!(other.opt.clip(), &Clip::autoclip(40.0));

    // A damaged state is refused, and nothing changes.
    let mut damaged = before;
    damaged.file.truncate(100);
    let error = other.restore(&damaged).unwrap_err();
    let error = error.downcast::<Error>()?;
    assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    assert_eq!(all_values_of_vars(other.opt.vars().vars())?, end);
    Ok(())
}
