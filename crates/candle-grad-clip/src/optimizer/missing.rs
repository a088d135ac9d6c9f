//! The Vars that have no gradient.

use std::sync::Arc;

use wildmatch::WildMatch;

use crate::gradients::Entry;
use crate::vars::NamedVars;

/// Caches the result of the previous step, since most steps miss the same Vars.
#[derive(Default)]
pub(crate) struct Missing {
    expected_prefixes: Vec<WildMatch>,
    indices: Vec<usize>,
    names: Arc<[String]>,
    warned: bool,
}

impl Missing {
    /// Vars whose name starts with one of these are not reported.
    pub(super) fn expect(&mut self, name_prefixes: &[&str]) {
        let expected_prefixes = std::mem::take(&mut self.expected_prefixes);
        *self = Self::default();
        self.expected_prefixes = expected_prefixes;
        let prefixes = name_prefixes.iter();
        let prefixes = prefixes.map(|prefix| WildMatch::new(&format!("{prefix}*")));
        self.expected_prefixes.extend(prefixes);
    }

    /// Returns the names of the float Vars without a gradient. Warns about them once.
    pub(super) fn notice(&mut self, vars: &NamedVars, entries: &[Entry<'_>]) -> Arc<[String]> {
        let names = vars.names();
        let is_expected = |name: &str| {
            let mut prefixes = self.expected_prefixes.iter();
            prefixes.any(|prefix| prefix.matches(name))
        };
        let is_missing = |(index, entry): &(usize, &Entry<'_>)| {
            let var = &vars.vars()[*index];
            entry.grad.is_none() && var.dtype().is_float() && !is_expected(&names[*index])
        };
        let missing = entries.iter().enumerate().filter(is_missing);
        let indices: Vec<usize> = missing.map(|(index, _)| index).collect();
        if indices != self.indices {
            self.names = indices.iter().map(|&index| names[index].clone()).collect();
            self.indices = indices;
        }
        if !self.names.is_empty() && !self.warned {
            self.warned = true;
            tracing::warn!(
                missing = ?self.names,
                of = names.len(),
                "Vars without a gradient are not trained: is there an operation without backward in \
                 front of them (LayerNorm::forward, RmsNorm::forward, softmax_last_dim, rope)?"
            );
        }
        self.names.clone()
    }
}
