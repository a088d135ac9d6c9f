//! What the fused optimizers share but for their names.

/// The methods and the `Optimizer` of a struct that has `trained: ParamStates` and
/// `params: $Params`. Where their docs differ the optimizer gives its own. A macro, since the
/// methods of a trait would need an import wherever they are called.
macro_rules! fused_optimizer {
    (
        $Optimizer:ident, $Params:ty,
        $(#[$master_weights:meta])* master_weights,
        $(#[$groups_example:meta])* groups,
    ) => {
        impl $Optimizer {
            /// Whether f16 and bf16 Vars have an f32 copy that takes the updates (see [the
            /// module](crate::optim)). Default: no.
            ///
            /// The copy is made in a Var's first step. Where a Var is set from outside after that
            /// (`Var::set`, `VarMap::load`), so that the copy no longer rounds to it, the copy is
            /// made anew in the next step.
            $(#[$master_weights])*
            #[must_use]
            pub fn master_weights(mut self, master_weights: bool) -> Self {
                self.trained.restart(Kept {
                    master_weights,
                    ..self.trained.kept()
                });
                self
            }

            /// Other learning rates and weight decays for some Vars, by name: for an optimizer by
            /// itself. One in a [`ClippedOptimizer`](crate::ClippedOptimizer) gets its groups from
            /// there.
            ///
            $(#[$groups_example])*
            ///
            /// # Errors
            /// A pattern that matches no Var; a group with a limit, as nothing is clipped here.
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

            /// Steps taken; a skipped step is none. Waits for a GPU that decides which are.
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
