//! A generative adversarial net: two optimizers, and losses that give gradients to the Vars of both
//! nets. The generator learns to make points around (2, -1).

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{Clip, ClippedOptimizer, GradAccumulator, NamedVars};
use candle_nn::{Linear, Module, Optimizer, SGD, VarBuilder, VarMap, ops};
use support::gradients::{bits_of_gradients, bits_of_vars, values};
use support::oracle::assert_close;

use super::{EXACT, assert_moved, builder, data, norm_by_hand, start, values_of, warnings};

const BATCH: usize = 32;
const CENTRE: [f32; 2] = [2.0, -1.0];

struct Net(Linear, Linear);

impl Net {
    fn new(sizes: [usize; 3], vb: &VarBuilder) -> candle_core::Result<Self> {
        let first = candle_nn::linear(sizes[0], sizes[1], vb.pp("0"))?;
        Ok(Self(
            first,
            candle_nn::linear(sizes[1], sizes[2], vb.pp("1"))?,
        ))
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.1.forward(&ops::leaky_relu(&self.0.forward(x)?, 0.2)?)
    }
}

struct Gan {
    generator: Net,
    discriminator: Net,
    /// The Vars of the generator and of the discriminator, each from its own map.
    vars: [NamedVars; 2],
}

/// `ln(1 + e^x)`, of moderate `x`.
fn softplus(x: &Tensor) -> candle_core::Result<Tensor> {
    (x.exp()? + 1.0)?.log()
}

impl Gan {
    fn new() -> Result<Self> {
        let maps = [VarMap::new(), VarMap::new()];
        let gan = Self {
            generator: Net::new([2, 16, 2], &builder(&maps[0]))?,
            discriminator: Net::new([2, 16, 1], &builder(&maps[1]))?,
            vars: [(&maps[0]).into(), (&maps[1]).into()],
        };
        start(&maps[0])?;
        start(&maps[1])?;
        Ok(gan)
    }

    fn fakes(&self, step: u64) -> Result<Tensor> {
        Ok(self.generator.forward(&data(2 * step, (BATCH, 2))?)?)
    }

    /// `detach` cuts the generator off, as one should; without it the loss is the same.
    fn discriminator_loss(&self, step: u64, detach: bool) -> Result<Tensor> {
        let centre = Tensor::new(&CENTRE, &Device::Cpu)?;
        let real = (data(2 * step + 1, (BATCH, 2))? * 0.3)?.broadcast_add(&centre)?;
        let mut fakes = self.fakes(step)?;
        if detach {
            fakes = fakes.detach();
        }
        let of_real = softplus(&self.discriminator.forward(&real)?.neg()?)?.mean_all()?;
        let of_fakes = softplus(&self.discriminator.forward(&fakes)?)?.mean_all()?;
        Ok((of_real + of_fakes)?)
    }

    /// Goes through the discriminator.
    fn generator_loss(&self, step: u64) -> Result<Tensor> {
        let scores = self.discriminator.forward(&self.fakes(step)?)?;
        Ok(softplus(&scores.neg()?)?.mean_all()?)
    }

    /// From the mean of the fakes to the centre of the real points.
    fn distance(&self) -> Result<f64> {
        let mean = values(&self.fakes(123_456)?.mean(0)?)?;
        let [x, y] = CENTRE.map(f64::from);
        Ok((mean[0] - x).hypot(mean[1] - y))
    }
}

const LIMITS: [f64; 2] = [0.2, 0.4];
const RATE: f64 = 0.3;

/// One step of either net, checked: the norm is that of its Vars, they move by their clipped
/// gradients, and the other net stays as it is.
fn checked_step<O: Optimizer + 'static>(
    opt: &mut ClippedOptimizer<O>,
    loss: &Tensor,
    own: &NamedVars,
    other: &NamedVars,
    in_place: bool,
) -> Result<f64> {
    let before = values_of(own.vars())?;
    let stays = bits_of_vars(other.vars())?;
    let grads = loss.backward()?;
    let norm = norm_by_hand(&grads, own.vars())?;
    let report = if in_place {
        opt.backward_step_report(loss)?
    } else {
        let bits = bits_of_gradients(&grads, other.vars())?;
        let report = opt.step_report(&grads)?;
        assert_eq!(bits_of_gradients(&grads, other.vars())?, bits);
        report
    };
    assert_close(report.total_norm()?, norm, EXACT, "norm");
    assert!(report.missing_grads().is_empty());
    assert_moved(own.vars(), &before, &grads, RATE * report.clip_coef()?)?;
    assert_eq!(bits_of_vars(other.vars())?, stays, "the other net");
    Ok(report.clip_coef()?)
}

/// The distance before and after, how many steps were clipped, and the weights.
type Trained = (f64, f64, [usize; 2], Vec<Vec<f64>>);

fn train<O: Optimizer + 'static>(
    make: impl Fn(&NamedVars) -> Result<O>,
    detach: bool,
    in_place: bool,
) -> Result<Trained> {
    let gan = Gan::new()?;
    let [generator, discriminator] = &gan.vars;
    let wrap = |vars: &NamedVars, limit| {
        ClippedOptimizer::wrap(make(vars)?, vars.clone(), Clip::norm(limit))
            .map_err(anyhow::Error::from)
    };
    let (mut g_opt, mut d_opt) = (wrap(generator, LIMITS[0])?, wrap(discriminator, LIMITS[1])?);
    let (before, mut clipped) = (gan.distance()?, [0, 0]);
    for step in 0..80 {
        let loss = gan.discriminator_loss(step, detach)?;
        let coef = checked_step(&mut d_opt, &loss, discriminator, generator, in_place)?;
        clipped[1] += usize::from(coef < 1.0);
        let loss = gan.generator_loss(step)?;
        let coef = checked_step(&mut g_opt, &loss, generator, discriminator, in_place)?;
        clipped[0] += usize::from(coef < 1.0);
    }
    let all: Vec<Var> = [generator.vars(), discriminator.vars()].concat();
    Ok((before, gan.distance()?, clipped, values_of(&all)?))
}

#[test]
fn each_optimizer_clips_and_moves_its_own_net() -> Result<()> {
    let sgd = |vars: &NamedVars| Ok(SGD::new(vars.vars().to_vec(), RATE)?);
    let trained = train(sgd, true, false)?;
    let (before, after, clipped, _) = &trained;
    assert!(*after < 0.5 * before, "{before} {after}");
    assert!(clipped.iter().all(|n| *n > 0 && *n < 80), "{clipped:?}");
    assert_eq!(train(sgd, true, true)?, trained, "in place");
    // Without `detach` the store has the generator's gradients too, which nothing takes.
    assert_eq!(train(sgd, false, false)?, trained, "not detached");
    let ours = |vars: &NamedVars| Ok(Sgd::from_named_vars(vars.clone(), RATE)?);
    assert_eq!(train(ours, false, true)?, trained, "the fused optimizer");
    Ok(())
}

/// A wrapper around an optimizer of candle can't know that another one trains the other net, so
/// `backward_step` warns once, unless it is told. Not for gradients that are handed over, and not
/// around a fused optimizer, which shows what it trains.
#[test]
fn the_other_nets_vars_are_one_warning_around_candles_optimizers() -> Result<()> {
    let gan = Gan::new()?;
    let generator = &gan.vars[0];
    let wrap = |allowed: &[&str]| -> Result<_> {
        let sgd = SGD::new(generator.vars().to_vec(), RATE)?;
        let (vars, clip) = (generator.clone(), Clip::norm(LIMITS[0]));
        Ok(ClippedOptimizer::wrap_allow_unclipped(
            sgd, vars, clip, allowed,
        )?)
    };
    let mut opt = wrap(&[])?;
    let handed_over = warnings(|| Ok(opt.step(&gan.generator_loss(0)?.backward()?)?))?;
    assert_eq!(handed_over, [""; 0]);
    let seen = warnings(|| {
        (1..4).try_for_each(|step| Ok(opt.backward_step(&gan.generator_loss(step)?)?))
    })?;
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert!(
        seen[0].contains("if the inner optimizer trains them") && seen[0].contains("unknown=4"),
        "{seen:?}"
    );
    let mut told = wrap(&["*"])?;
    let seen = warnings(|| Ok(told.backward_step(&gan.generator_loss(4)?)?))?;
    assert_eq!(seen, [""; 0]);

    let ours = Sgd::from_named_vars(generator.clone(), RATE)?;
    let mut opt = ClippedOptimizer::wrap(ours, generator.clone(), Clip::norm(LIMITS[0]))?;
    let seen = warnings(|| Ok(opt.backward_step(&gan.generator_loss(5)?)?))?;
    assert_eq!(seen, [""; 0]);
    Ok(())
}

/// The generator's loss leaves gradients of the discriminator in its store. With PyTorch they would
/// pile up until `zero_grad`; an accumulator that takes the discriminator's Vars would do the same,
/// so each optimizer has one of its own Vars.
#[test]
fn accumulators_take_the_gradients_of_their_own_vars() -> Result<()> {
    let gan = Gan::new()?;
    let [generator, discriminator] = &gan.vars;
    let mut of_generator = GradAccumulator::sum(generator.clone());
    let mut of_discriminator = GradAccumulator::sum(discriminator.clone());
    let d_loss = gan.discriminator_loss(0, true)?.backward()?;
    let g_loss = gan.generator_loss(0)?.backward()?;
    of_discriminator.add(&d_loss)?;
    of_generator.add(&g_loss)?;
    let ours = of_discriminator.take_grads()?.unwrap();
    assert_eq!(
        bits_of_gradients(ours, discriminator.vars())?,
        bits_of_gradients(&d_loss, discriminator.vars())?
    );
    let ours = of_generator.take_grads()?.unwrap();
    assert_eq!(
        bits_of_gradients(ours, generator.vars())?,
        bits_of_gradients(&g_loss, generator.vars())?
    );
    assert!(
        discriminator
            .vars()
            .iter()
            .all(|var| ours.get(var).is_none())
    );
    Ok(())
}
