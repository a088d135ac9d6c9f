//! The methods that the fused optimizers share.

/// The methods and the `Optimizer` of a struct that has `trained: ParamStates` and `params:
/// $Params`. The optimizer passes the docs that differ. A macro, because the methods of a trait
/// would need an import wherever they are called.
macro_rules! fused_optimizer {
    (
        $Optimizer:ident, $Params:ty,
        $(#[$master_weights:meta])* master_weights,
        $(#[$groups_example:meta])* groups,
    ) => {
        impl $Optimizer {
            /// Whether f16 and bf16 Vars have an f32 copy that accumulates the updates (see [the
            /// module](crate::optim)). Default: no.
            ///
            /// The copy is made in a Var's first step. If a Var is later set from outside
            /// (`Var::set`, `VarMap::load`) and the copy no longer rounds to it, the next step
            /// makes a new copy.
            $(#[$master_weights])*
            #[must_use]
            pub fn master_weights(mut self, master_weights: bool) -> Self {
                self.trained.restart(StateLayout {
                    master_weights,
                    ..self.trained.layout()
                });
                self
            }

            /// Sets learning rates and weight decays for groups of Vars. Only for an optimizer
            /// without a wrapper: a [`ClippedOptimizer`](crate::ClippedOptimizer) passes its own
            /// groups on.
            ///
            $(#[$groups_example])*
            ///
            /// # Errors
            /// A pattern that matches no Var, or a group with `max_norm` or `no_clip`, as nothing
            /// is clipped here.
            pub fn with_param_groups(mut self, groups: ParamGroups) -> Result<Self> {
                check_no_limits(&groups)?;
                self.trained.set_groups(groups)?;
                Ok(self)
            }

            /// The hyper-parameters.
            #[must_use]
            pub fn params(&self) -> &$Params {
                &self.params
            }

            /// The Vars, with their names.
            #[must_use]
            pub fn vars(&self) -> &NamedVars {
                self.trained.vars()
            }

            /// Steps taken, without skipped steps. Waits for a GPU that decides the steps.
            #[must_use]
            pub fn steps(&self) -> u64 {
                self.trained.steps()
            }
        }

        impl Optimizer for $Optimizer {
            type Config = $Params;

            fn new(vars: Vec<Var>, params: $Params) -> candle_core::Result<Self> {
                Ok(Self::from_named_vars(vars, params)?)
            }

            fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
                Ok(self.fused_step(grads, None)?)
            }

            fn learning_rate(&self) -> f64 {
                self.params.lr
            }

            fn set_learning_rate(&mut self, lr: f64) {
                self.params.lr = lr;
            }
        }
    };
}

pub(super) use fused_optimizer;
