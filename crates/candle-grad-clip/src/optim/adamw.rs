use std::fmt;

use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_grad_clip_kernels as kernels;
use candle_nn::{Optimizer, ParamsAdamW};

use super::fused::Fused;
use super::param_states::ParamStates;
use super::params::{AdamWSettings, Settings, check_adamw, check_numbers};
use super::shared::fused_optimizer;
use crate::error::Result;
use crate::groups::{ParamGroup, ParamGroups, check_no_limits};
use crate::param_state::{StateLayout, StepRule};
use crate::vars::NamedVars;

/// AdamW with the clip fused into its update: a replacement for [`candle_nn::AdamW`].
///
/// ```text
/// m <- beta1 m + (1 - beta1) g
/// v <- beta2 v + (1 - beta2) g^2
/// theta <- (1 - lr weight_decay) theta - lr m_hat / (sqrt(v_hat) + eps)
/// m_hat = m / (1 - beta1^step),  v_hat = v / (1 - beta2^step)
/// ```
///
/// `step` counts the steps in which a Var had a gradient, as in PyTorch. So a Var that gets its
/// first gradient late starts like any other. (candle counts for all Vars together. There the first
/// step of such a Var is too long, up to 3.2 times the learning rate with the default decays.) An
/// `eps` below 1e-20 (1e-150 for f64 Vars) is raised to that value: with 0, a zero gradient would
/// give NaN.
///
/// If every Var has a gradient in each step, the f32 and f64 weights are bit-identical to those of
/// `candle_nn::AdamW`, except for the sign of zeros. Vars may have any shape, may mix f32, f64, f16
/// and bf16, and may be on any devices. Moments are f32, or f64 for f64 Vars (candle's have the
/// Var's dtype). A Var that comes twice is updated once.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_grad_clip::optim::AdamW; // instead of candle_nn::AdamW
/// use candle_grad_clip::{Clip, ClippedOptimizer, StepPath};
/// use candle_nn::{Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
/// let model = candle_nn::linear(4, 1, vb)?;
/// let opt = AdamW::new(varmap.all_vars(), ParamsAdamW::default())?;
/// let mut opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?;
///
/// let x = Tensor::ones((8, 4), DType::F32, &Device::Cpu)?;
/// let loss = model.forward(&x)?.sqr()?.mean_all()?;
/// let report = opt.backward_step_report(&loss)?;
/// assert_eq!(report.path(), StepPath::Fused);
/// # Ok(())
/// # }
/// ```
///
/// # References
/// Loshchilov, Hutter (2019), "Decoupled weight decay regularization"; `torch.optim.AdamW` (PyTorch
/// 2.15).
pub struct AdamW {
    trained: ParamStates,
    params: ParamsAdamW,
}

impl AdamW {
    /// An optimizer of named Vars, from `&VarMap`, `Vec<(String, Var)>` or `Vec<Var>` (see
    /// [`NamedVars`]). Checkpoints and errors use the names. In a
    /// [`ClippedOptimizer`](crate::ClippedOptimizer) the wrapper's names replace them.
    ///
    /// ```
    /// use candle_grad_clip::optim::AdamW;
    /// use candle_nn::{Optimizer, ParamsAdamW, VarMap};
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let opt = AdamW::from_named_vars(&VarMap::new(), ParamsAdamW::default())?;
    /// assert_eq!(opt.learning_rate(), 1e-3);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A hyper-parameter that is non-finite or outside its range: `lr`, `eps`, `weight_decay` 0 or
    /// above, `beta1` and `beta2` in `[0, 1)`.
    pub fn from_named_vars(vars: impl Into<NamedVars>, params: ParamsAdamW) -> Result<Self> {
        check_adamw(&params)?;
        Ok(Self {
            trained: ParamStates::new(vars.into(), StateLayout::adamw(false, false)),
            params,
        })
    }

    /// With the defaults of [`ParamsAdamW`], except for the learning rate.
    ///
    /// # Errors
    /// As [`AdamW::from_named_vars`].
    pub fn new_lr(vars: Vec<Var>, learning_rate: f64) -> candle_core::Result<Self> {
        let params = ParamsAdamW {
            lr: learning_rate,
            ..ParamsAdamW::default()
        };
        Self::new(vars, params)
    }

    /// Whether to use the largest second moment so far (`AMSGrad`), which needs one more array.
    /// Default: no.
    ///
    /// This resets the moments and the step counter.
    ///
    /// # References
    /// Reddi, Kale, Kumar (2018), "On the convergence of Adam and beyond"; `amsgrad` of
    /// `torch.optim.AdamW`.
    #[must_use]
    pub fn amsgrad(mut self, amsgrad: bool) -> Self {
        let master_weights = self.trained.layout().master_weights;
        self.trained
            .restart(StateLayout::adamw(amsgrad, master_weights));
        self
    }

    /// Sets the hyper-parameters. The next step checks them.
    pub fn set_params(&mut self, params: ParamsAdamW) {
        self.params = params;
    }
}

fused_optimizer! {
    AdamW, ParamsAdamW,
    /// This resets the moments and the step counter.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use candle_grad_clip::optim::AdamW;
    /// use candle_nn::Optimizer;
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let w = Var::ones(1, DType::BF16, &Device::Cpu)?;
    /// let mut opt = AdamW::new_lr(vec![w.clone()], 1e-3)?.master_weights(true);
    /// for _ in 0..8 {
    ///     opt.backward_step(&w.to_dtype(DType::F32)?.sum_all()?)?; // 0.001 less, 8 times
    /// }
    /// assert_eq!(w.to_dtype(DType::F32)?.to_vec1::<f32>()?, [0.9921875]); // without it: 1
    /// # Ok(())
    /// # }
    /// ```
    master_weights,
    /// ```
    /// use candle_core::{Device, Var};
    /// use candle_grad_clip::optim::{AdamW, ParamGroup, ParamGroups};
    /// use candle_nn::Optimizer;
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let w = Var::new(&[1f64], &Device::Cpu)?;
    /// let groups = ParamGroups::new(vec![ParamGroup::new("frozen", &["emb*"]).lr_scale(0.0)])?;
    /// let mut opt = AdamW::from_named_vars(vec![("embed".to_string(), w.clone())], candle_nn::ParamsAdamW::default())?.with_param_groups(groups)?;
    /// opt.backward_step(&w.sum_all()?)?;
    /// assert_eq!(w.to_vec1::<f64>()?, [1.0]);
    /// # Ok(())
    /// # }
    /// ```
    groups,
}

impl Fused for AdamW {
    fn next_rule(&self, group: Option<&ParamGroup>) -> Result<StepRule> {
        check_adamw(&self.params)?;
        let ParamsAdamW {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
        } = self.params;
        let lr = lr * group.map_or(1.0, ParamGroup::learning_rate_scale);
        let weight_decay = group.map_or(weight_decay, |group| group.weight_decay_or(weight_decay));
        check_numbers(
            self.trained.vars(),
            &[
                ("lr", lr),
                ("eps", eps),
                ("lr times weight_decay", lr * weight_decay),
            ],
        )?;
        let step = self.trained.next_step(); // replaced by each Var's own
        Ok(StepRule::AdamW(kernels::AdamW {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            step,
        }))
    }

    fn trained(&self) -> &ParamStates {
        &self.trained
    }

    fn trained_mut(&mut self) -> &mut ParamStates {
        &mut self.trained
    }

    fn settings(&self) -> Settings {
        let layout = self.trained.layout();
        Settings::AdamW(AdamWSettings {
            params: self.params.clone(),
            amsgrad: layout.moments == 3,
            master_weights: layout.master_weights,
        })
    }

    fn set_settings(&mut self, settings: Settings) {
        if let Settings::AdamW(settings) = settings {
            self.params = settings.params;
        }
    }
}

/// Without state, which is as large as the model.
impl fmt::Debug for AdamW {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.trained.finish_debug(
            f.debug_struct("AdamW")
                .field("params", &self.params)
                .field("amsgrad", &(self.trained.layout().moments == 3)),
        )
    }
}
