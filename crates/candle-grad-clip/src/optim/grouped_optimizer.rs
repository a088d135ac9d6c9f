use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_nn::Optimizer;

use crate::error::Result;
use crate::groups::{ParamGroup, ParamGroups};
use crate::vars::NamedVars;

/// [`ParamGroups`] for any optimizer: one inner optimizer per group, with the group's Vars and
/// settings.
///
/// [`AdamW`](super::AdamW) and [`Sgd`](super::Sgd) support groups directly.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::optim::{ParamGroup, ParamGroups, GroupedOptimizer};
/// use candle_grad_clip::{Clip, ClippedOptimizer};
/// use candle_nn::{Optimizer, SGD};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = vec![
///     ("body".to_string(), Var::new(&[1f64], &Device::Cpu)?),
///     ("head".to_string(), Var::new(&[1f64], &Device::Cpu)?),
/// ];
/// let loss = (vars[0].1.sum_all()? + vars[1].1.sum_all()?)?;
/// let groups = ParamGroups::new(vec![ParamGroup::new("slow", &["body"]).lr_scale(0.1).max_norm(1.0)])?;
/// let opt = GroupedOptimizer::new(vars.clone(), &groups, 0.5, |vars, _group, lr| SGD::new(vars, lr))?;
/// let mut opt = ClippedOptimizer::wrap(opt, vars.clone(), Clip::norm(10.0))?.with_param_groups(groups.max_norms_only())?;
/// opt.backward_step(&loss)?;
/// assert!((vars[0].1.to_vec1::<f64>()?[0] - 0.95).abs() < 1e-6); // a gradient of 1, at a rate of 0.05
/// assert_eq!(vars[1].1.to_vec1::<f64>()?, [0.5]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GroupedOptimizer<O> {
    /// Each with the factor of its learning rate.
    inner: Vec<(f64, O)>,
    learning_rate: f64,
}

impl<O: Optimizer> GroupedOptimizer<O> {
    /// Calls `make(vars, group, learning_rate)` for each group that has Vars, and for the Vars
    /// without a group (`None`).
    ///
    /// # Errors
    /// A pattern that matches no Var, or an error of `make`.
    pub fn new(
        vars: impl Into<NamedVars>,
        groups: &ParamGroups,
        learning_rate: f64,
        mut make: impl FnMut(Vec<Var>, Option<&ParamGroup>, f64) -> candle_core::Result<O>,
    ) -> Result<Self> {
        let vars = vars.into();
        let group_of = groups.group_of(vars.names())?;
        let mut inner = Vec::new();
        let all = std::iter::once(None).chain((0..).zip(groups).map(Some));
        for group in all {
            let (index, group) = group.unzip();
            let members = vars.vars().iter().zip(&*group_of);
            let members = members.filter(|(_, of)| **of == index);
            let members: Vec<Var> = members.map(|(var, _)| var.clone()).collect();
            if members.is_empty() {
                continue;
            }
            let scale = group.map_or(1.0, ParamGroup::learning_rate_scale);
            inner.push((scale, make(members, group, learning_rate * scale)?));
        }
        Ok(Self {
            inner,
            learning_rate,
        })
    }
}

/// Groups need names, so [`Optimizer::new`] makes one group of all Vars.
impl<O: Optimizer> Optimizer for GroupedOptimizer<O> {
    type Config = O::Config;

    fn new(vars: Vec<Var>, config: O::Config) -> candle_core::Result<Self> {
        let inner = O::new(vars, config)?;
        Ok(Self {
            learning_rate: inner.learning_rate(),
            inner: vec![(1.0, inner)],
        })
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        self.inner
            .iter_mut()
            .try_for_each(|(_, inner)| inner.step(grads))
    }

    fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.learning_rate = lr;
        for (scale, inner) in &mut self.inner {
            inner.set_learning_rate(lr * *scale);
        }
    }
}
