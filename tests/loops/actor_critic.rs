//! Reinforcement learning: an actor and a critic, each with its own optimizer, on made-up states.
//!
//! The reward of an action is `-(action - best(state))^2`. One loop is candle's `ddpg` example:
//! target networks that follow the trained ones, a critic that the actor's loss goes through. The
//! other has one loss, one backward pass and two optimizers on its gradients.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{D, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, NamedVars, clip_grad_norm};
use candle_nn::{Linear, Module, Optimizer, ParamsAdamW, SGD, VarBuilder, VarMap};
use support::gradients::{all_values_of_vars, bits_of_gradients, bits_of_vars, values};
use support::oracle::assert_close;

use super::{EXACT, assert_moved, builder, data, mean, norm_by_hand, start, values_of};

const STATE: usize = 3;
const BATCH: usize = 64;

/// Two layers with a tanh between them, and one output.
struct Net(Linear, Linear);

impl Net {
    fn new(inputs: usize, vb: &VarBuilder) -> candle_core::Result<Self> {
        let hidden = candle_nn::linear(inputs, 24, vb.pp("fc1"))?;
        Ok(Self(hidden, candle_nn::linear(24, 1, vb.pp("fc2"))?))
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.1.forward(&self.0.forward(x)?.tanh()?)
    }
}

struct Agent {
    map: VarMap,
    actor: Net,
    critic: Net,
    target_actor: Net,
    target_critic: Net,
}

impl Agent {
    /// All networks in one map, as candle's example has them.
    fn new() -> Result<Self> {
        let map = VarMap::new();
        let vb = builder(&map);
        let net = |inputs, name: &str| Net::new(inputs, &vb.pp(name));
        let agent = Self {
            actor: net(STATE, "actor")?,
            critic: net(STATE + 1, "critic")?,
            target_actor: net(STATE, "target-actor")?,
            target_critic: net(STATE + 1, "target-critic")?,
            map: map.clone(),
        };
        start(&map)?;
        agent.follow(1.0)?;
        Ok(agent)
    }

    fn vars(&self, pattern: &str) -> Result<NamedVars> {
        Ok(NamedVars::from(&self.map).matching(&[pattern])?)
    }

    /// `target <- tau * trained + (1 - tau) * target`
    fn follow(&self, tau: f64) -> Result<()> {
        for name in ["actor.*", "critic.*"] {
            let trained = self.vars(name)?;
            let targets = self.vars(&format!("target-{name}"))?;
            for (trained, target) in trained.vars().iter().zip(targets.vars()) {
                let kept = (target.as_tensor() * (1.0 - tau))?;
                target.set(&((trained.as_tensor() * tau)? + kept)?)?;
            }
        }
        Ok(())
    }

    fn value(net: &Net, states: &Tensor, actions: &Tensor) -> candle_core::Result<Tensor> {
        net.forward(&Tensor::cat(&[states, actions], D::Minus1)?)
    }

    /// Of made-up transitions; the targets are constants.
    fn critic_loss(&self, step: u64) -> Result<Tensor> {
        let (states, next) = (
            data(2 * step, (BATCH, STATE))?,
            data(2 * step + 1, (BATCH, STATE))?,
        );
        let actions = data(step + 7_000_000, (BATCH, 1))?;
        let then = Self::value(
            &self.target_critic,
            &next,
            &self.target_actor.forward(&next)?.tanh()?,
        )?;
        let goal = (reward(&states, &actions)? + (then * 0.2)?)?.detach();
        Ok((Self::value(&self.critic, &states, &actions)? - goal)?
            .sqr()?
            .mean_all()?)
    }

    /// Through the critic, whose Vars get gradients too.
    fn actor_loss(&self, step: u64) -> Result<Tensor> {
        let states = data(2 * step, (BATCH, STATE))?;
        let actions = self.actor.forward(&states)?.tanh()?;
        Ok(Self::value(&self.critic, &states, &actions)?
            .mean_all()?
            .neg()?)
    }

    /// The mean distance of the actor's actions from the best ones.
    fn distance(&self) -> Result<f64> {
        let states = data(1, (64, STATE))?;
        let error = (self.actor.forward(&states)?.tanh()? - best(&states)?)?.abs()?;
        Ok(mean(&values(&error)?))
    }
}

fn best(states: &Tensor) -> candle_core::Result<Tensor> {
    states.mean_keepdim(D::Minus1)? * 0.8
}

fn reward(states: &Tensor, actions: &Tensor) -> candle_core::Result<Tensor> {
    (actions - best(states)?)?.sqr()?.neg()
}

fn adamw(lr: f64) -> ParamsAdamW {
    ParamsAdamW {
        lr,
        ..ParamsAdamW::default()
    }
}

/// Trains, and returns the distance before and after, and the bits of all weights.
fn ddpg<O: Optimizer + 'static>(
    make: impl Fn(&NamedVars, f64) -> Result<O>,
) -> Result<(f64, f64, Vec<Vec<u64>>)> {
    let agent = Agent::new()?;
    let before = agent.distance()?;
    let (actor, critic) = (agent.vars("actor.*")?, agent.vars("critic.*")?);
    let targets = agent.vars("target-*")?;
    let wrap = |vars: &NamedVars, lr, limit| -> Result<ClippedOptimizer<O>> {
        Ok(ClippedOptimizer::wrap(
            make(vars, lr)?,
            vars.clone(),
            Clip::norm(limit),
        )?)
    };
    let mut actor_opt = wrap(&actor, 0.005, 0.2)?;
    let mut critic_opt = wrap(&critic, 0.02, 1.0)?;
    for step in 0..300 {
        if step == 150 {
            actor_opt.set_clip(Clip::norm(0.05))?; // smaller steps from here on
        }
        let limit = if step < 150 { 0.2 } else { 0.05 };

        let others = (bits_of_vars(actor.vars())?, bits_of_vars(targets.vars())?);
        let grads = agent.critic_loss(step)?.backward()?;
        let report = critic_opt.step_report(&grads)?;
        assert_close(
            report.total_norm()?,
            norm_by_hand(&grads, critic.vars())?,
            EXACT,
            "critic",
        );
        assert!(report.missing_grads().is_empty());
        let now = (bits_of_vars(actor.vars())?, bits_of_vars(targets.vars())?);
        assert_eq!(now, others, "what the critic's step leaves alone");

        let others = (bits_of_vars(critic.vars())?, bits_of_vars(targets.vars())?);
        let grads = agent.actor_loss(step)?.backward()?;
        assert!(
            norm_by_hand(&grads, critic.vars())? > 0.0,
            "the critic's are in the store"
        );
        let report = actor_opt.step_report(&grads)?;
        let norm = norm_by_hand(&grads, actor.vars())?;
        assert_close(report.total_norm()?, norm, EXACT, "actor");
        let clipped = norm.min(limit * norm / (norm + 1e-6));
        assert_close(
            report.record()?.clipped_norm,
            clipped,
            EXACT,
            "actor, clipped",
        );
        let now = (bits_of_vars(critic.vars())?, bits_of_vars(targets.vars())?);
        assert_eq!(now, others, "what the actor's step leaves alone");
        agent.follow(0.05)?;
    }
    let all = bits_of_vars(NamedVars::from(&agent.map).vars())?;
    Ok((before, agent.distance()?, all))
}

#[test]
fn ddpg_with_candles_optimizers_and_with_ours() -> Result<()> {
    let theirs = |vars: &NamedVars, lr| Ok(candle_nn::AdamW::new(vars.vars().to_vec(), adamw(lr))?);
    let (before, after, bits) = ddpg(theirs)?;
    assert!(after < 0.5 * before, "{before} {after}");
    assert_eq!(ddpg(theirs)?, (before, after, bits));
    let ours = ddpg(|vars, lr| Ok(AdamW::from_named_vars(vars.clone(), adamw(lr))?))?;
    assert_eq!((ours.0, ours.1), (before, after), "the fused optimizer");
    Ok(())
}

/// A wrapper that is given the whole map: around an optimizer of candle it can't know who is
/// trained, and counts the critic in the actor's norm. Around ours it knows.
#[test]
fn the_whole_map_is_too_much_for_the_actors_wrapper() -> Result<()> {
    let agent = Agent::new()?;
    let actor = agent.vars("actor.*")?;
    let grads = agent.actor_loss(0)?.backward()?;
    let both = NamedVars::from(&agent.map).matching(&["actor.*", "critic.*"])?;
    let (of_actor, of_both) = (
        norm_by_hand(&grads, actor.vars())?,
        norm_by_hand(&grads, both.vars())?,
    );
    assert!(of_both > 1.05 * of_actor, "{of_actor} {of_both}");

    let sgd = SGD::new(actor.vars().to_vec(), 0.0)?;
    let mut opt = ClippedOptimizer::wrap(sgd, &agent.map, Clip::norm(0.2))?;
    let report = opt.step_report(&grads)?;
    assert_close(report.total_norm()?, of_both, EXACT, "candle's SGD");
    let targets = agent.vars("target-*")?;
    assert_eq!(report.missing_grads(), targets.names());
    let mut opt = opt.ignore_missing_grads(&["target-"]);
    assert!(opt.step_report(&grads)?.missing_grads().is_empty());

    let sgd = Sgd::from_named_vars(actor.clone(), 0.0)?;
    let mut opt = ClippedOptimizer::wrap(sgd, &agent.map, Clip::norm(0.2))?;
    let report = opt.step_report(&grads)?;
    assert_close(report.total_norm()?, of_actor, EXACT, "our Sgd");
    assert!(report.missing_grads().is_empty());
    Ok(())
}

/// An actor with a value function: their losses are summed, for one backward pass.
struct Joint {
    actor: (Net, NamedVars),
    critic: (Net, NamedVars),
}

impl Joint {
    fn new() -> Result<Self> {
        let map = VarMap::new();
        let net = |name: &str| Net::new(STATE, &builder(&map).pp(name));
        let nets = (net("actor")?, net("critic")?);
        start(&map)?;
        let vars = |pattern| NamedVars::from(&map).matching(&[pattern]);
        Ok(Self {
            actor: (nets.0, vars("actor.*")?),
            critic: (nets.1, vars("critic.*")?),
        })
    }

    /// The loss of the policy, a Gaussian of fixed width around the actor's action, and that of the
    /// value. The advantage is a constant.
    fn losses(&self, step: u64) -> Result<(Tensor, Tensor)> {
        let states = data(step, (BATCH, STATE))?;
        let means = self.actor.0.forward(&states)?;
        let actions = (means.detach() + (data(step + 9_000_000, (BATCH, 1))? * 0.5)?)?;
        let advantage = (reward(&states, &actions)? - self.critic.0.forward(&states)?)?;
        let policy = ((actions - means)?.sqr()? * advantage.detach())?.mean_all()?;
        Ok((policy, advantage.sqr()?.mean_all()?))
    }

    fn loss(&self, step: u64) -> Result<Tensor> {
        let (policy, value) = self.losses(step)?;
        Ok((policy + (value * 0.5)?)?)
    }

    fn all(&self) -> Vec<Var> {
        [self.actor.1.vars(), self.critic.1.vars()].concat()
    }
}

/// Two optimizers on the gradients of one backward pass: neither sees what the other clipped.
#[test]
fn two_optimizers_over_one_graph() -> Result<()> {
    const RATE: f64 = 0.1;
    let run = || -> Result<(Vec<f64>, Vec<Vec<u64>>)> {
        let joint = Joint::new()?;
        let wrap = |vars: &NamedVars, limit| {
            let sgd = SGD::new(vars.vars().to_vec(), RATE)?;
            ClippedOptimizer::wrap(sgd, vars.clone(), Clip::norm(limit))
        };
        let (actor, critic) = (&joint.actor.1, &joint.critic.1);
        let (mut first, mut second) = (wrap(actor, 0.2)?, wrap(critic, 0.5)?);
        let mut value_losses = Vec::new();
        for step in 0..150 {
            value_losses.push(f64::from(joint.losses(step)?.1.to_scalar::<f32>()?));
            let grads = joint.loss(step)?.backward()?;
            let before = bits_of_gradients(&grads, &joint.all())?;
            for (opt, vars) in [(&mut first, actor), (&mut second, critic)] {
                let starts = values_of(vars.vars())?;
                let report = opt.step_report(&grads)?;
                let norm = norm_by_hand(&grads, vars.vars())?;
                assert_close(report.total_norm()?, norm, EXACT, "norm");
                assert_moved(vars.vars(), &starts, &grads, RATE * report.clip_coef()?)?;
            }
            assert_eq!(bits_of_gradients(&grads, &joint.all())?, before);
        }
        Ok((value_losses, bits_of_vars(&joint.all())?))
    };
    let trained = run()?;
    let losses = &trained.0;
    assert!(
        mean(&losses[140..]) < 0.5 * mean(&losses[..10]),
        "{losses:?}"
    );
    assert_eq!(run()?, trained);
    Ok(())
}

/// The same with the functions, as PyTorch's loops are written: in place, each on its own Vars.
#[test]
fn the_functions_scale_their_own_vars_only() -> Result<()> {
    let joint = Joint::new()?;
    let (actor, critic) = (joint.actor.1.vars(), joint.critic.1.vars());
    let mut grads = joint.loss(0)?.backward()?;
    let of = |grads: &GradStore, vars: &[Var]| norm_by_hand(grads, vars);
    let before = (of(&grads, actor)?, of(&grads, critic)?);
    assert!(before.0 > 0.1 && before.1 > 0.3, "{before:?}");
    let untouched = bits_of_gradients(&grads, critic)?;
    assert_close(
        clip_grad_norm(&mut grads, actor, 0.1)?,
        before.0,
        EXACT,
        "actor",
    );
    assert_eq!(bits_of_gradients(&grads, critic)?, untouched);
    assert_close(of(&grads, actor)?, 0.1, 1e-5, "actor, clipped");
    assert_close(
        clip_grad_norm(&mut grads, critic, 0.3)?,
        before.1,
        EXACT,
        "critic",
    );
    assert_close(of(&grads, critic)?, 0.3, 1e-5, "critic, clipped");
    Ok(())
}

/// A limit that is a function of the step does what `set_clip` before each step does.
#[test]
fn a_schedule_is_set_clip_before_each_step() -> Result<()> {
    let run = |scheduled: bool| -> Result<Vec<f64>> {
        let agent = Agent::new()?;
        let actor = agent.vars("actor.*")?;
        let sgd = SGD::new(actor.vars().to_vec(), 0.1)?;
        let limit = |step: u64| 0.2 / (1.0 + step as f64 / 10.0);
        let mut opt = ClippedOptimizer::wrap(sgd, actor.clone(), Clip::norm(1.0))?;
        if scheduled {
            opt = opt.with_max_norm_schedule(limit)?;
        }
        for step in 1..=20 {
            if !scheduled {
                opt.set_clip(Clip::norm(limit(step)))?;
            }
            let report = opt.backward_step_report(&agent.actor_loss(step)?)?;
            assert!(report.record()?.clipped_norm <= limit(step));
            assert_eq!(opt.clip(), &Clip::norm(limit(step)));
        }
        Ok(all_values_of_vars(actor.vars())?)
    };
    assert_eq!(run(true)?, run(false)?);
    Ok(())
}
