use std::any::Any;

use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_nn::Optimizer;

use super::adamw::AdamW;
use super::fused::{Fused, FusedParts};
use super::sgd::Sgd;
use crate::check::check_not_negative;
use crate::error::{Error, Result};
use crate::vars::NamedVars;

/// Two optimizers over different Vars as one, such as Muon for the matrices and AdamW for the rest.
/// A [`ClippedOptimizer`](crate::ClippedOptimizer) clips the global norm of the Vars of both.
///
/// If both are [`AdamW`] or [`Sgd`], the wrapper's clip is folded into both updates. Otherwise the
/// gradients are edited before the two steps, in place by `backward_step`.
///
/// # Learning rate
/// `learning_rate` is that of the first optimizer. `set_learning_rate` moves both, and keeps the
/// ratio that they had in [`Pair::new`]: so one schedule drives both. To change one alone, use
/// [`first_mut`](Self::first_mut) or [`second_mut`](Self::second_mut); the next `set_learning_rate`
/// of the pair replaces that rate.
///
/// # Groups
/// Limits are the wrapper's: `opt.with_param_groups(groups.max_norms_only())`. Learning rates and
/// weight decays are each optimizer's: [`AdamW::with_param_groups`], before the pair is made.
///
/// # Checkpoints
/// If both are [`AdamW`] or [`Sgd`], the wrapper's `save` and `load` include both, in one file.
/// Otherwise each optimizer that can be saved is saved by itself:
/// `opt.inner().second().save(path)`, and loaded by `inner_mut().second_mut()`.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_grad_clip::optim::{AdamW, Pair, Sgd};
/// use candle_grad_clip::{Clip, ClippedOptimizer, NamedVars};
/// use candle_nn::{Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let model = candle_nn::linear(4, 1, vb)?;
///
/// let all = NamedVars::from(&varmap);
/// let named = all.names().iter().cloned().zip(all.vars().iter().cloned());
/// let (matrices, rest): (Vec<(String, Var)>, Vec<_>) = named.partition(|(_, var)| var.rank() >= 2);
/// let first = Sgd::from_named_vars(matrices.clone(), 0.1)?; // in the place of Muon
/// let second = AdamW::from_named_vars(rest.clone(), ParamsAdamW::default())?;
/// let pair = Pair::new(first, matrices, second, rest)?;
/// let mut opt = ClippedOptimizer::wrap(pair, &varmap, Clip::norm(1.0))?;
///
/// let x = Tensor::ones((8, 4), DType::F32, &Device::Cpu)?;
/// let report = opt.backward_step_report(&model.forward(&x)?.sqr()?.mean_all()?)?;
/// assert!(report.record()?.clipped_norm <= 1.0 + 1e-6); // of weight and bias together
/// opt.set_learning_rate(0.05);
/// assert_eq!(opt.inner().second().learning_rate(), 0.0005); // half of 1e-3, as 0.05 is half of 0.1
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Pair<A, B> {
    first: A,
    second: B,
    /// The second learning rate divided by the first.
    ratio: f64,
}

/// Config of a [`Pair`] for [`Optimizer::new`]: which Vars the first optimizer gets, and the
/// configs of both.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use candle_grad_clip::optim::{Pair, PairConfig, Sgd};
/// use candle_nn::{Optimizer, SGD};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = vec![Var::zeros((2, 2), DType::F32, &Device::Cpu)?, Var::zeros(2, DType::F32, &Device::Cpu)?];
/// let is_first = |var: &Var| var.rank() >= 2;
/// let config = PairConfig { is_first, first: 0.2, second: 0.1.into() };
/// let pair = <Pair<SGD, Sgd> as Optimizer>::new(vars, config)?;
/// assert_eq!(pair.second().vars().vars()[0].dims(), [2]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct PairConfig<A, B> {
    /// Whether a Var goes to the first optimizer.
    pub is_first: fn(&Var) -> bool,
    /// The first optimizer's config.
    pub first: A,
    /// The second optimizer's config.
    pub second: B,
}

impl<A: Optimizer, B: Optimizer> Pair<A, B> {
    /// A pair of two optimizers that train these Vars: `&VarMap`, `Vec<(String, Var)>` or
    /// `Vec<Var>`.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::Error;
    /// # use candle_grad_clip::optim::Pair;
    /// # use candle_nn::{Optimizer, SGD};
    /// let (a, b) = (Var::new(1f32, &Device::Cpu)?, Var::new(1f32, &Device::Cpu)?);
    /// let sgd = |vars: &[(String, Var)]| SGD::new(vars.iter().map(|(_, var)| var.clone()).collect(), 0.1);
    /// let both = vec![("a".to_string(), a), ("b".to_string(), b.clone())];
    /// let one = vec![("b".to_string(), b)];
    /// let error = Pair::new(sgd(&both)?, both, sgd(&one)?, one).unwrap_err();
    /// assert!(matches!(error, Error::SharedVars { vars } if vars == ["b"]));
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// A Var that both train: it would take two steps. A first learning rate that is not above 0, or
    /// a second one that is negative: see [the type](Self#learning-rate).
    pub fn new(
        first: A,
        first_vars: impl Into<NamedVars>,
        second: B,
        second_vars: impl Into<NamedVars>,
    ) -> Result<Self> {
        let shared = second_vars.into().names_of_shared(&first_vars.into());
        if !shared.is_empty() {
            return Err(Error::SharedVars { vars: shared });
        }
        Self::of_rates(first, second)
    }

    fn of_rates(first: A, second: B) -> Result<Self> {
        let (one, two) = (first.learning_rate(), second.learning_rate());
        if !(one > 0.0 && one.is_finite()) {
            return Err(Error::InvalidOption {
                name: "the first optimizer's learning rate",
                value: one,
                expected: "a finite value above 0: the second rate is a multiple of it",
            });
        }
        check_not_negative(SECOND_RATE, two)?;
        Ok(Self {
            ratio: two / one,
            first,
            second,
        })
    }

    /// The first optimizer.
    #[must_use]
    pub fn first(&self) -> &A {
        &self.first
    }

    /// The first optimizer, mutably.
    pub fn first_mut(&mut self) -> &mut A {
        &mut self.first
    }

    /// The second optimizer.
    #[must_use]
    pub fn second(&self) -> &B {
        &self.second
    }

    /// The second optimizer, mutably.
    pub fn second_mut(&mut self) -> &mut B {
        &mut self.second
    }

    /// Both optimizers.
    #[must_use]
    pub fn into_inner(self) -> (A, B) {
        (self.first, self.second)
    }
}

const SECOND_RATE: &str = "the second optimizer's learning rate";

impl<A: Optimizer, B: Optimizer> Optimizer for Pair<A, B> {
    type Config = PairConfig<A::Config, B::Config>;

    fn new(vars: Vec<Var>, config: Self::Config) -> candle_core::Result<Self> {
        let vars = NamedVars::from(vars).vars().to_vec(); // each once
        let (first, second) = vars.into_iter().partition(config.is_first);
        let first = A::new(first, config.first)?;
        Ok(Self::of_rates(first, B::new(second, config.second)?)?)
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        check_not_negative(SECOND_RATE, self.second.learning_rate())?;
        self.first.step(grads)?;
        self.second.step(grads)
    }

    fn learning_rate(&self) -> f64 {
        self.first.learning_rate()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.first.set_learning_rate(lr);
        self.second.set_learning_rate(lr * self.ratio);
    }
}

/// Calls a macro with each pair of fused optimizers.
macro_rules! for_each_fused_pair {
    ($each:ident) => {
        $each!(AdamW, AdamW);
        $each!(AdamW, Sgd);
        $each!(Sgd, AdamW);
        $each!(Sgd, Sgd);
    };
}

/// The parts of a pair of fused optimizers, if it is one.
pub(super) fn fused_parts(optimizer: &mut dyn Any) -> Option<FusedParts<'_>> {
    macro_rules! if_it_is {
        ($A:ty, $B:ty) => {
            if optimizer.is::<Pair<$A, $B>>() {
                let pair = optimizer.downcast_mut::<Pair<$A, $B>>();
                return pair.map(|pair| FusedParts::two(&mut pair.first, &mut pair.second));
            }
        };
    }
    for_each_fused_pair!(if_it_is);
    None
}

/// The same, to read; empty if it is none.
pub(super) fn fused_refs(optimizer: &dyn Any) -> Vec<&dyn Fused> {
    macro_rules! if_it_is {
        ($A:ty, $B:ty) => {
            if let Some(pair) = optimizer.downcast_ref::<Pair<$A, $B>>() {
                return vec![&pair.first, &pair.second];
            }
        };
    }
    for_each_fused_pair!(if_it_is);
    Vec::new()
}
