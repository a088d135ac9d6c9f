use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, TryLockError};

use candle_core::{TensorId, Var};
use candle_nn::VarMap;
use rustc_hash::FxHashSet;
use wildmatch::WildMatch;

use crate::error::{Error, Result};
use crate::tensors::{device_has, storage_addresses};
use crate::threads::Work;

/// Vars with their names, in a fixed order. Reports and errors use the names.
///
/// Made from a `&VarMap` or `&mut VarMap` (sorted by name, since candle's map has another order in each run), from a
/// `Vec<(String, Var)>` in the given order, or from a `Vec<Var>` (named `var.0`, `var.1`, ...). A
/// Var that comes twice (tied weights) is kept once, under its first name.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use candle_grad_clip::NamedVars;
///
/// # fn main() -> candle_core::Result<()> {
/// let w = Var::zeros(2, DType::F32, &Device::Cpu)?;
/// let vars = NamedVars::from(vec![("embed".to_string(), w.clone()), ("head".to_string(), w)]);
/// assert_eq!(vars.names(), ["embed"]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct NamedVars {
    names: Arc<[String]>,
    vars: Vec<Var>,
    /// Whether a Var is named by its index, and the order may differ between processes.
    pub(crate) has_places: bool,
    /// The addresses of the Vars' storages, which never change.
    storages: FxHashSet<usize>,
    work: Work,
    /// The map that the Vars come from.
    source: Option<Source>,
}

impl NamedVars {
    /// The names, in order.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_grad_clip::NamedVars;
    /// # use candle_nn::{VarBuilder, VarMap};
    /// let map = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    /// let model = candle_nn::linear(4, 1, vb.pp("head"))?;
    /// assert_eq!(NamedVars::from(&map).names(), ["head.bias", "head.weight"]); // sorted
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The Vars, in order.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_grad_clip::NamedVars;
    /// let w = Var::new(0f32, &Device::Cpu)?;
    /// let vars = NamedVars::from(vec![w.clone(), w]); // tied: kept once
    /// assert_eq!(vars.vars().len(), 1);
    /// assert_eq!(vars.names(), ["var.0"]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[must_use]
    pub fn vars(&self) -> &[Var] {
        &self.vars
    }

    /// Vars that checkpoints match by index (`var.0`, `var.1`, ...). The order must be the same in
    /// each process; that of `VarMap::all_vars` is not. A plain `Vec<Var>` has the same names, but
    /// checkpoints refuse it: in another order, moments of the same shape would silently go to the
    /// wrong Vars.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use candle_grad_clip::NamedVars;
    /// use candle_grad_clip::optim::AdamW;
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// # let path = std::env::temp_dir().join(format!("candle-grad-clip-by-place-{}", std::process::id()));
    /// let vars = vec![Var::zeros(2, DType::F32, &Device::Cpu)?];
    /// let by_place = NamedVars::by_place(vars.clone());
    /// assert_eq!(by_place.names(), ["var.0"]);
    /// AdamW::from_named_vars(by_place, Default::default())?.save(&path)?;
    /// let error = AdamW::from_named_vars(vars, Default::default())?.save(&path).unwrap_err();
    /// assert!(error.to_string().contains("names of their own"));
    /// # let _ = std::fs::remove_file(path);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn by_place(vars: Vec<Var>) -> Self {
        let name = |(i, var)| (unnamed(i), var);
        let named = vars.into_iter().enumerate().map(name);
        named.collect::<Vec<_>>().into()
    }

    /// The Vars whose names match one of `patterns`, in the same order: for an optimizer that
    /// trains a part of a model. `*` stands for any characters, `?` for one, and the whole name
    /// must match.
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use candle_grad_clip::optim::Sgd;
    /// use candle_grad_clip::{Clip, ClippedOptimizer, NamedVars};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// # fn main() -> candle_grad_clip::Result<()> {
    /// let map = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    /// let actor = candle_nn::linear(4, 2, vb.pp("actor"))?;
    /// let critic = candle_nn::linear(4, 1, vb.pp("critic"))?;
    /// let vars = NamedVars::from(&map).matching(&["actor.*"])?;
    /// assert_eq!(vars.names(), ["actor.bias", "actor.weight"]);
    /// let opt = Sgd::from_named_vars(vars.clone(), 0.1)?;
    /// let opt = ClippedOptimizer::wrap(opt, vars, Clip::norm(0.5))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A pattern that matches no name.
    pub fn matching(self, patterns: &[&str]) -> Result<Self> {
        check_patterns("NamedVars::matching", patterns, &self.names)?;
        let patterns: Vec<WildMatch> = patterns.iter().map(|text| WildMatch::new(text)).collect();
        let is_match = |name: &str| patterns.iter().any(|pattern| pattern.matches(name));
        // Without the map: its other Vars would seem to be new ones.
        let without_map = Self {
            source: None,
            ..self
        };
        Ok(without_map.retained(|name, _| is_match(name)))
    }

    /// Like [`NamedVars::names`], shared.
    pub(crate) fn shared_names(&self) -> &Arc<[String]> {
        &self.names
    }

    /// An error if a device does not support its Var's dtype.
    pub(crate) fn check_devices(&self) -> Result<()> {
        let lacks = |var: &Var| !device_has(var.dtype(), || var.device().is_metal());
        match self.vars.iter().position(lacks) {
            Some(index) => Err(Error::MetalF64 {
                var: self.names[index].clone(),
            }),
            None => Ok(()),
        }
    }

    /// The map that the Vars come from, if there is one.
    pub(crate) fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    /// The Vars that `keep` selects, in the same order. Returns `self` if it selects all.
    pub(crate) fn filtered(self, keep: impl Fn(&Var) -> bool) -> Self {
        if self.vars.iter().all(&keep) {
            return self;
        }
        self.retained(|_, var| keep(var))
    }

    fn retained(self, keep: impl Fn(&str, &Var) -> bool) -> Self {
        let (has_places, source) = (self.has_places, self.source);
        let named = self.names.iter().cloned().zip(self.vars);
        let kept = named.filter(|(name, var)| keep(name, var));
        Self {
            has_places,
            source,
            ..kept.collect::<Vec<_>>().into()
        }
    }

    /// The same with a separate allocation of the names, so that its address identifies this list.
    pub(crate) fn with_own_names(self) -> Self {
        Self {
            names: self.names.to_vec().into(),
            ..self
        }
    }

    /// The names of those that `other` has too.
    pub(crate) fn names_of_shared(&self, other: &Self) -> Vec<String> {
        let theirs: FxHashSet<TensorId> = other.vars.iter().map(|var| var.id()).collect();
        let both = self.vars.iter().zip(self.names.iter());
        let shared = both.filter(|(var, _)| theirs.contains(&var.id()));
        shared.map(|(_, name)| name.clone()).collect()
    }

    /// An error if two Vars have the same name.
    pub(crate) fn check_names(&self) -> Result<()> {
        let mut seen = FxHashSet::default();
        match self.names.iter().find(|name| !seen.insert(*name)) {
            Some(name) => Err(Error::DuplicateName { name: name.clone() }),
            None => Ok(()),
        }
    }

    pub(crate) fn list(&self) -> VarList<'_> {
        VarList {
            vars: &self.vars,
            named: Some(self),
            work: self.work,
        }
    }
}

impl From<Vec<(String, Var)>> for NamedVars {
    fn from(named: Vec<(String, Var)>) -> Self {
        let mut seen: FxHashSet<TensorId> = FxHashSet::default();
        let (names, vars): (Vec<String>, Vec<Var>) = named
            .into_iter()
            .filter(|(_, var)| seen.insert(var.id()))
            .unzip();
        let work = Work::of(&vars);
        let storages = storage_addresses(&vars, work).into_iter().collect();
        Self {
            names: names.into(),
            vars,
            has_places: false,
            storages,
            work,
            source: None,
        }
    }
}

impl From<Vec<Var>> for NamedVars {
    fn from(vars: Vec<Var>) -> Self {
        Self {
            has_places: true,
            ..Self::by_place(vars)
        }
    }
}

impl From<&VarMap> for NamedVars {
    fn from(map: &VarMap) -> Self {
        // A poisoned lock means that another thread panicked; the map itself is intact.
        let data = map
            .data()
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut named: Vec<_> = data
            .iter()
            .map(|(name, var)| (name.clone(), var.clone()))
            .collect();
        drop(data);
        named.sort_by(|a, b| a.0.cmp(&b.0));
        let source = Source {
            map: map.clone(),
            len: named.len(),
        };
        Self {
            source: Some(source),
            ..named.into()
        }
    }
}

impl From<&mut VarMap> for NamedVars {
    fn from(map: &mut VarMap) -> Self {
        Self::from(&*map)
    }
}

impl From<&NamedVars> for NamedVars {
    fn from(vars: &NamedVars) -> Self {
        vars.clone()
    }
}

/// A handle to a map, and how many Vars it had.
#[derive(Clone)]
pub(crate) struct Source {
    map: VarMap,
    len: usize,
}

impl Source {
    /// The names and Vars of the map, if it has grown. Does not wait for the lock: a thread that
    /// holds the map may wait for us.
    pub(crate) fn if_grown(&self) -> Option<Vec<(String, Var)>> {
        let data = match self.map.data().try_lock() {
            Ok(data) => data,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let own = |(name, var): (&String, &Var)| (name.clone(), var.clone());
        (data.len() > self.len).then(|| data.iter().map(own).collect())
    }
}

/// candle's map has no `Debug`.
impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Source");
        shown.field("len", &self.len).finish_non_exhaustive()
    }
}

/// Borrowed Vars: named and unique, or the plain slice of a free function.
#[derive(Clone, Copy)]
pub(crate) struct VarList<'a> {
    pub(crate) vars: &'a [Var],
    named: Option<&'a NamedVars>,
    pub(crate) work: Work,
}

impl<'a> VarList<'a> {
    pub(crate) fn unnamed(vars: &'a [Var]) -> Self {
        Self {
            vars,
            named: None,
            work: Work::of(vars),
        }
    }

    pub(crate) fn name(&self, index: usize) -> String {
        self.named
            .map_or_else(|| unnamed(index), |named| named.names[index].clone())
    }

    /// Whether a Var may be in the list twice.
    pub(crate) fn may_repeat(&self) -> bool {
        self.named.is_none()
    }

    pub(crate) fn storages(&self) -> Cow<'a, FxHashSet<usize>> {
        if let Some(named) = self.named {
            return Cow::Borrowed(&named.storages);
        }
        let addresses = storage_addresses(self.vars, self.work);
        Cow::Owned(addresses.into_iter().collect())
    }
}

/// An error for a pattern that matches no name, which is most likely a typing error.
pub(crate) fn check_patterns(
    group: &str,
    patterns: &[impl AsRef<str>],
    names: &[String],
) -> Result<()> {
    for text in patterns {
        let pattern = WildMatch::new(text.as_ref());
        if !names.iter().any(|name| pattern.matches(name)) {
            return Err(Error::UnmatchedPattern {
                group: group.to_string(),
                pattern: pattern.to_string(),
                vars: names.len(),
                example: names.first().cloned().unwrap_or_default(),
            });
        }
    }
    Ok(())
}

fn unnamed(index: usize) -> String {
    format!("var.{index}")
}
