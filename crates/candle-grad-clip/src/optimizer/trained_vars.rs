//! Whether the inner optimizer trains the Vars that the wrapper has: known of our own optimizers,
//! looked for in others.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, TensorId, Var};
use rustc_hash::FxHashSet;
use wildmatch::WildMatch;

use super::inner::Inner;
use crate::error::{Error, Result};
use crate::optim::Fused;
use crate::vars::{NamedVars, Source};

/// What the names of all wrappers' types begin with.
const WRAPPER: &str = concat!(env!("CARGO_CRATE_NAME"), "::optimizer::ClippedOptimizer");

/// What the wrapper knows of the Vars that are trained.
#[derive(Debug)]
pub(crate) struct TrainedVars {
    /// Patterns of names that the inner optimizer may train without us.
    allow_unclipped: Vec<String>,
    /// The Vars that the wrapper was given.
    given: FxHashSet<TensorId>,
    /// Where they are from, until it is found to have grown.
    source: Option<Source>,
    /// How many gradients of others the store had when the graph was searched last.
    searched: Option<usize>,
    warned: bool,
}

impl TrainedVars {
    /// Looks at the Vars of `inner`, and returns those of `given` that it trains, as far as that
    /// can be known.
    pub(super) fn new(
        inner: &Inner<'_>,
        inner_name: &'static str,
        given: NamedVars,
        allow_unclipped: &[&str],
    ) -> Result<(Self, NamedVars)> {
        given.check_names()?;
        let trained = Self {
            allow_unclipped: allow_unclipped.iter().map(ToString::to_string).collect(),
            given: ids(&given),
            source: given.source().cloned(),
            searched: None,
            warned: false,
        };
        let given = given.with_own_names();
        let Inner::Fused(fused) = inner else {
            warn_of_halves(inner_name, &given);
            return Ok((trained, given));
        };
        trained.check_unclipped(fused.trained().vars())?;
        let untrained = untrained(fused.trained().vars(), &given);
        if untrained.is_empty() {
            return Ok((trained, given));
        }
        tracing::info!(
            ?untrained,
            "Vars that the inner optimizer does not train are left out: they count in no norm"
        );
        let theirs = ids(fused.trained().vars());
        let is_trained = |var: &Var| theirs.contains(&var.id()) || !var.dtype().is_float();
        Ok((trained, given.filtered(is_trained)))
    }

    /// Gives one of our optimizers the wrapper's names, once it is found to train the wrapper's
    /// Vars.
    pub(crate) fn adopt(&self, fused: &mut dyn Fused, vars: &NamedVars) -> Result<()> {
        if fused.trained().has_adopted(vars) {
            return Ok(());
        }
        self.check_unclipped(fused.trained().vars())?;
        let untrained = untrained(fused.trained().vars(), vars);
        if !untrained.is_empty() {
            return Err(Error::UntrainedVars { vars: untrained });
        }
        fused.adopt(vars)
    }

    /// The error of Vars that would be trained unclipped.
    fn check_unclipped(&self, trained: &NamedVars) -> Result<()> {
        let is_allowed = |name: &String| {
            let mut patterns = self.allow_unclipped.iter();
            patterns.any(|pattern| WildMatch::new(pattern).matches(name))
        };
        let both = trained.vars().iter().zip(trained.names());
        let others = both.filter(|(var, _)| {
            // Others never get a gradient.
            var.dtype().is_float() && !self.given.contains(&var.id())
        });
        let names = others.map(|(_, name)| name);
        let unclipped: Vec<String> = names.filter(|name| !is_allowed(name)).cloned().collect();
        if unclipped.is_empty() {
            return Ok(());
        }
        Err(Error::UnclippedVars { vars: unclipped })
    }

    /// Warns once of Vars that came into the `VarMap` after `wrap`.
    pub(super) fn notice_growth(&mut self) {
        let Some(map) = self.source.as_ref().and_then(Source::if_grown) else {
            return;
        };
        let new = map.into_iter().filter(|(_, var)| {
            // A name more for a Var that is here is nothing new.
            !self.given.contains(&var.id())
        });
        let mut new: Vec<String> = new.map(|(name, _)| name).collect();
        if new.is_empty() {
            return;
        }
        new.sort();
        self.source = None;
        tracing::warn!(
            ?new,
            "Vars that were added to the VarMap after `wrap` are not clipped, and not trained unless the inner optimizer \
             was given them: make the optimizer and its wrapper when the model is whole"
        );
    }

    /// Warns once of Vars with a gradient that the wrapper was not given, for an inner optimizer
    /// that may train them. `found` is how many of the store's gradients are of the wrapper's Vars.
    pub(super) fn notice_unknown(&mut self, loss: &Tensor, grads: &GradStore, found: usize) {
        let others = grads.get_ids().count() - found;
        // The graph is searched again only when it has changed: constants have gradients, too.
        if self.warned || others == 0 || self.searched == Some(others) {
            return;
        }
        self.searched = Some(others);
        let mut unknown = loss.sorted_nodes();
        unknown.retain(|node| node.is_variable() && !self.given.contains(&node.id()));
        if unknown.is_empty() {
            return;
        }
        self.warned = true;
        let shapes: Vec<&[usize]> = unknown.iter().map(|var| var.dims()).collect();
        tracing::warn!(
            unknown = unknown.len(),
            ?shapes,
            "Vars that the wrapper was not given have gradients: if the inner optimizer trains them, they are neither \
             measured nor clipped; wrap with all that it trains"
        );
    }
}

/// The gradients of `grads` that are not of the wrapper's Vars, without the loss's scale: which of
/// them are of Vars that the inner optimizer trains, a store does not tell.
pub(super) fn unscaled_others(
    vars: &NamedVars,
    grads: &GradStore,
    scale: f64,
) -> Result<Vec<(TensorId, Tensor)>> {
    if scale == 1.0 {
        return Ok(Vec::new());
    }
    let known = ids(vars);
    let mut unscaled = Vec::new();
    for id in grads.get_ids().filter(|id| !known.contains(id)) {
        let Some(grad) = grads.get_id(*id) else {
            continue;
        };
        let grad = match grad.dtype() {
            DType::F32 | DType::F64 => (grad / scale)?,
            // A factor is rounded to the dtype first: 2^-25 is 0 in f16.
            dtype @ (DType::F16 | DType::BF16) => {
                (grad.to_dtype(DType::F32)? / scale)?.to_dtype(dtype)?
            }
            _ => continue,
        };
        unscaled.push((*id, grad));
    }
    Ok(unscaled)
}

fn ids(vars: &NamedVars) -> FxHashSet<TensorId> {
    vars.vars().iter().map(|var| var.id()).collect()
}

/// The names of the Vars that are not among those trained; only float Vars ever get a gradient.
fn untrained(trained: &NamedVars, vars: &NamedVars) -> Vec<String> {
    let trained = ids(trained);
    let both = vars.vars().iter().zip(vars.names());
    let others = both.filter(|(var, _)| var.dtype().is_float() && !trained.contains(&var.id()));
    others.map(|(_, name)| name.clone()).collect()
}

/// Warns of what candle's optimizers do to halves.
fn warn_of_halves(optimizer: &'static str, vars: &NamedVars) {
    let is_half = |dtype| matches!(dtype, DType::F16 | DType::BF16);
    let halves: Vec<&String> = vars
        .vars()
        .iter()
        .zip(vars.names())
        .filter(|(var, _)| is_half(var.dtype()))
        .map(|(_, name)| name)
        .collect();
    // One in it has looked already; a name that says so wrongly costs a warning, and no more.
    if halves.is_empty() || optimizer.starts_with(WRAPPER) {
        return;
    }
    tracing::warn!(
        optimizer,
        first = halves[0],
        halves = halves.len(),
        "Vars are F16 or BF16: an optimizer that computes in their dtype, as candle's do, can make them non-finite from \
         finite gradients (an eps of 1e-8 is 0 in F16) and loses small updates; optim::AdamW and optim::Sgd compute in F32"
    );
}
