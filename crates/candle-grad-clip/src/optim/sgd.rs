use std::fmt;

use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_grad_clip_kernels as kernels;
use candle_nn::Optimizer;

use super::fused::Fused;
use super::param_states::ParamStates;
use super::params::{ParamsSgd, Settings, SgdSettings, check_numbers, check_sgd};
use super::shared::fused_optimizer;
use crate::error::{Error, Result};
use crate::groups::{ParamGroup, ParamGroups, check_no_limits};
use crate::param_state::{StateLayout, StepRule};
use crate::vars::NamedVars;

/// Stochastic gradient descent with momentum as in PyTorch, and with the clip fused into its
/// update.
///
/// ```text
/// g <- g + weight_decay theta
/// b <- momentum b + (1 - dampening) g      (b <- g in a Var's first step, the first with a gradient)
/// d = g + momentum b if nesterov, else b   (d = g without momentum)
/// theta <- theta - lr d
/// ```
///
/// Without momentum and weight decay, the weights are bit-identical to those of [`candle_nn::SGD`].
/// Vars may have any shape, may mix f32, f64, f16 and bf16, and may be on any devices. The buffer
/// is f32, or f64 for f64 Vars. A Var that comes twice is updated once.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::optim::{ParamsSgd, Sgd};
/// use candle_grad_clip::{Clip, ClippedOptimizer};
/// use candle_nn::Optimizer;
///
/// # fn main() -> candle_core::Result<()> {
/// let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
/// let params = ParamsSgd { lr: 0.5, momentum: 0.9, ..Default::default() };
/// let opt = Sgd::new(vec![w.clone()], params)?;
/// let mut opt = ClippedOptimizer::wrap(opt, vec![w.clone()], Clip::value(1.0))?;
/// opt.backward_step(&w.sqr()?.sum_all()?)?;
/// assert_eq!(w.to_vec1::<f64>()?, [2.5, 3.5]);
/// # Ok(())
/// # }
/// ```
///
/// # References
/// `torch.optim.SGD` (PyTorch 2.15).
pub struct Sgd {
    trained: ParamStates,
    params: ParamsSgd,
}

impl Sgd {
    /// An optimizer of named Vars, from `&VarMap`, `Vec<(String, Var)>` or `Vec<Var>` (see
    /// [`NamedVars`]). Checkpoints and errors use the names. In a
    /// [`ClippedOptimizer`](crate::ClippedOptimizer) the wrapper's names replace them.
    ///
    /// ```
    /// use candle_grad_clip::optim::Sgd;
    /// use candle_nn::VarMap;
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let opt = Sgd::from_named_vars(&VarMap::new(), 0.1)?;
    /// assert_eq!(opt.params().momentum, 0.0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A non-finite or negative hyper-parameter, a dampening above 1, or Nesterov momentum without
    /// momentum or with dampening. A step also fails if one of its numbers is infinite in f32,
    /// unless all Vars are f64.
    pub fn from_named_vars(
        vars: impl Into<NamedVars>,
        params: impl Into<ParamsSgd>,
    ) -> Result<Self> {
        let params = params.into();
        check_sgd(&params)?;
        let layout = StateLayout::sgd(params.momentum, false);
        Ok(Self {
            trained: ParamStates::new(vars.into(), layout),
            params,
        })
    }

    /// Plain gradient descent.
    ///
    /// # Errors
    /// A non-finite or negative learning rate.
    pub fn new_lr(vars: Vec<Var>, learning_rate: f64) -> candle_core::Result<Self> {
        Self::new(vars, learning_rate.into())
    }

    /// Sets the hyper-parameters, from the next step on.
    ///
    /// # Errors
    /// As [`Sgd::from_named_vars`]. A momentum that changes from or to 0, as this changes the kept
    /// state. The hyper-parameters are then unchanged.
    pub fn set_params(&mut self, params: impl Into<ParamsSgd>) -> Result<()> {
        let params = params.into();
        check_sgd(&params)?;
        if (params.momentum == 0.0) != (self.params.momentum == 0.0) {
            return Err(Error::InvalidOption {
                name: "momentum",
                value: params.momentum,
                expected: "0 if it was 0, and not if it was not: make a new optimizer for that",
            });
        }
        self.params = params;
        Ok(())
    }
}

fused_optimizer! {
    Sgd, ParamsSgd,
    /// This resets the momentum and the step counter.
    master_weights,
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_grad_clip::optim::{Sgd, ParamGroup, ParamGroups};
    /// use candle_nn::Optimizer;
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let w = Var::new(&[1f64], &Device::Cpu)?;
    /// let groups = ParamGroups::new(vec![ParamGroup::new("frozen", &["emb*"]).lr_scale(0.0)])?;
    /// let mut opt = Sgd::from_named_vars(vec![("embed".to_string(), w.clone())], 0.1)?.with_param_groups(groups)?;
    /// opt.backward_step(&w.sum_all()?)?;
    /// assert_eq!(w.to_vec1::<f64>()?, [1.0]);
    /// # Ok(())
    /// # }
    /// ```
    groups,
}

impl Fused for Sgd {
    fn next_rule(&self, group: Option<&ParamGroup>) -> Result<StepRule> {
        check_sgd(&self.params)?;
        let ParamsSgd {
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
        } = self.params;
        let lr = lr * group.map_or(1.0, ParamGroup::learning_rate_scale);
        let weight_decay = group.map_or(weight_decay, |group| group.weight_decay_or(weight_decay));
        check_numbers(
            self.trained.vars(),
            &[
                ("lr", lr),
                ("momentum", momentum),
                ("weight_decay", weight_decay),
            ],
        )?;
        Ok(StepRule::Sgd(kernels::Sgd {
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            is_first: false,
        }))
    }

    fn trained(&self) -> &ParamStates {
        &self.trained
    }

    fn trained_mut(&mut self) -> &mut ParamStates {
        &mut self.trained
    }

    fn settings(&self) -> Settings {
        Settings::Sgd(SgdSettings {
            params: self.params,
            master_weights: self.trained.layout().master_weights,
        })
    }

    fn set_settings(&mut self, settings: Settings) {
        if let Settings::Sgd(settings) = settings {
            self.params = settings.params;
        }
    }
}

/// Without state, which is as large as the model.
impl fmt::Debug for Sgd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.trained
            .finish_debug(f.debug_struct("Sgd").field("params", &self.params))
    }
}
