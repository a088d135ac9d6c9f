//! Compares the Vars of the wrapper with those that the inner optimizer trains. Fused optimizers
//! list them; for others the loss's graph is searched.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, TensorId, Var};
use rustc_hash::FxHashSet;
use wildmatch::WildMatch;

use super::inner::Inner;
use crate::error::{Error, Result};
use crate::optim::FusedParts;
use crate::vars::{NamedVars, Source};

/// The prefix of every wrapper's type name.
const WRAPPER: &str = concat!(env!("CARGO_CRATE_NAME"), "::optimizer::ClippedOptimizer");

/// What the wrapper knows about the trained Vars.
#[derive(Debug)]
pub(crate) struct TrainedVars {
    /// Patterns of Vars that the inner optimizer may train unclipped.
    allow_unclipped: Vec<String>,
    /// The Vars that the wrapper was given.
    given: FxHashSet<TensorId>,
    /// The `VarMap` they are from, until new Vars are found in it.
    source: Option<Source>,
    /// The number of other gradients in the store at the last search of the graph.
    searched: Option<usize>,
    warned: bool,
}

impl TrainedVars {
    /// Compares `given` with the Vars of `inner`. Returns those of `given` that it trains, as far
    /// as that is known.
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
            // The Vars of the warning have no names, so no other pattern can match them.
            warned: allow_unclipped.contains(&"*"),
        };
        let given = given.with_own_names();
        let Inner::Fused(parts) = inner else {
            warn_of_halves(inner_name, &given);
            return Ok((trained, given));
        };
        trained.check_unclipped(parts)?;
        let untrained = untrained(parts, &given);
        if untrained.is_empty() {
            return Ok((trained, given));
        }
        tracing::info!(
            ?untrained,
            "Vars that the inner optimizer does not train are ignored: no norm includes them"
        );
        let theirs = ids_of(parts);
        let is_trained = |var: &Var| theirs.contains(&var.id()) || !var.dtype().is_float();
        Ok((trained, given.filtered(is_trained)))
    }

    /// Gives fused optimizers the wrapper's names, after checking that they train the wrapper's
    /// Vars.
    pub(crate) fn adopt(&self, parts: &mut FusedParts<'_>, vars: &NamedVars) -> Result<()> {
        if parts.iter().all(|fused| fused.trained().has_adopted(vars)) {
            return Ok(());
        }
        self.check_unclipped(parts)?;
        let untrained = untrained(parts, vars);
        if !untrained.is_empty() {
            return Err(Error::UntrainedVars { vars: untrained });
        }
        parts.try_for_each(|fused| fused.adopt(vars))
    }

    /// Refuses Vars that would be trained unclipped.
    fn check_unclipped(&self, parts: &FusedParts<'_>) -> Result<()> {
        let is_allowed = |name: &String| {
            let mut patterns = self.allow_unclipped.iter();
            patterns.any(|pattern| WildMatch::new(pattern).matches(name))
        };
        let trained = parts.iter().map(|fused| fused.trained().vars());
        let both = trained.flat_map(|vars| vars.vars().iter().zip(vars.names()));
        let others = both.filter(|(var, _)| {
            // Other dtypes never have a gradient.
            var.dtype().is_float() && !self.given.contains(&var.id())
        });
        let names = others.map(|(_, name)| name);
        let unclipped: Vec<String> = names.filter(|name| !is_allowed(name)).cloned().collect();
        if unclipped.is_empty() {
            return Ok(());
        }
        Err(Error::UnclippedVars { vars: unclipped })
    }

    /// Warns once about Vars that were added to the `VarMap` after `wrap`.
    pub(super) fn notice_growth(&mut self) {
        let Some(map) = self.source.as_ref().and_then(Source::if_grown) else {
            return;
        };
        let new = map.into_iter().filter(|(_, var)| {
            // A second name for a known Var does not matter.
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
             was given them: create the optimizer and its wrapper after the model is complete"
        );
    }

    /// Warns once about Vars that have a gradient, but that the wrapper was not given, for an inner
    /// optimizer that may train them. `found` is the number of the wrapper's gradients in the
    /// store.
    pub(super) fn notice_unknown(&mut self, loss: &Tensor, grads: &GradStore, found: usize) {
        let others = grads.get_ids().count() - found;
        // Constants have gradients too, so search the graph again only if the number changed.
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
             measured nor clipped. Pass all Vars that it trains to `wrap`; if another optimizer trains them, allow `*` in \
             `wrap_allow_unclipped`"
        );
    }
}

/// The gradients of other tensors, without the loss scale. The store does not show which of them
/// the inner optimizer uses.
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
            // In f32, since the factor is rounded to the dtype: 2^-25 is 0 in f16.
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

/// The Vars that fused optimizers train.
fn ids_of(parts: &FusedParts<'_>) -> FxHashSet<TensorId> {
    parts
        .iter()
        .flat_map(|fused| ids(fused.trained().vars()))
        .collect()
}

/// The names of the float Vars that are not trained; other dtypes never have a gradient.
fn untrained(parts: &FusedParts<'_>, vars: &NamedVars) -> Vec<String> {
    let trained = ids_of(parts);
    let both = vars.vars().iter().zip(vars.names());
    let others = both.filter(|(var, _)| var.dtype().is_float() && !trained.contains(&var.id()));
    others.map(|(_, name)| name.clone()).collect()
}

/// Warns that candle's optimizers compute in half precision.
fn warn_of_halves(optimizer: &'static str, vars: &NamedVars) {
    let is_half = |dtype| matches!(dtype, DType::F16 | DType::BF16);
    let halves: Vec<&String> = vars
        .vars()
        .iter()
        .zip(vars.names())
        .filter(|(var, _)| is_half(var.dtype()))
        .map(|(_, name)| name)
        .collect();
    // An inner wrapper has warned already. If the name matches by accident, only a warning is lost.
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
