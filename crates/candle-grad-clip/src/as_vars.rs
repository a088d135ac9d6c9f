//! What the free functions accept as a list of Vars.

use candle_core::Var;
use candle_nn::VarMap;

use crate::vars::{NamedVars, VarList};

/// A list of Vars for the free functions, such as [`clip_grad_norm`](crate::clip_grad_norm).
///
/// - Slices, arrays and `Vec`s of `Var` or `&Var`. Errors name the Vars by their index: `var.0`.
/// - `(String, Var)` pairs, a [`NamedVars`] or a `VarMap`. Errors have their names. A `VarMap` is
///   sorted at each call: in a loop, make a [`NamedVars`] once, or use
///   [`ClippedOptimizer::vars`](crate::ClippedOptimizer::vars).
///
/// An empty list needs its type: `&[] as &[Var]`. The trait is sealed.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::{NamedVars, NormType, clip_grad_norm, total_norm};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let (a, b) = (Var::new(3f64, &Device::Cpu)?, Var::new(4f64, &Device::Cpu)?);
/// let loss = ((a.sqr()? + b.sqr()?)? / 2.0)?; // the gradients are 3 and 4
/// let grads = loss.backward()?;
/// assert_eq!(total_norm(&grads, &vec![a.clone(), b.clone()], NormType::L2)?, 5.0);
/// assert_eq!(total_norm(&grads, &[&a, &b], NormType::L2)?, 5.0);
///
/// let named = NamedVars::from(vec![("a".to_string(), a), ("b".to_string(), b)]);
/// let mut bad = (loss * f64::NAN)?.backward()?;
/// let error = clip_grad_norm(&mut bad, &named, 1.0).unwrap_err();
/// assert!(error.to_string().contains("first bad Var is a "), "{error}");
/// # Ok(())
/// # }
/// ```
pub trait AsVars: sealed::Borrowed {}

impl<T: sealed::Borrowed + ?Sized> AsVars for T {}

/// Vars that are borrowed, or collected for one call.
#[derive(Debug)]
pub enum Vars<'a> {
    Slice(&'a [Var]),
    Collected(Vec<Var>),
    Named(&'a NamedVars),
    MadeNamed(NamedVars),
}

impl Vars<'_> {
    pub(crate) fn list(&self) -> VarList<'_> {
        match self {
            Self::Slice(vars) => VarList::unnamed(vars),
            Self::Collected(vars) => VarList::unnamed(vars),
            Self::Named(vars) => vars.list(),
            Self::MadeNamed(vars) => vars.list(),
        }
    }
}

mod sealed {
    use super::Vars;

    #[diagnostic::on_unimplemented(
        message = "`{Self}` is not a list of Vars",
        label = "expected a list of Vars",
        note = "expected one of `&[Var]`, `&[&Var]`, `&Vec<Var>`, `&[(String, Var)]`, `&NamedVars`, `&VarMap`"
    )]
    pub trait Borrowed {
        fn vars(&self) -> Vars<'_>;
    }
}

use sealed::Borrowed;

impl<T: Borrowed + ?Sized> Borrowed for &T {
    fn vars(&self) -> Vars<'_> {
        (**self).vars()
    }
}

impl Borrowed for [Var] {
    fn vars(&self) -> Vars<'_> {
        Vars::Slice(self)
    }
}

impl Borrowed for [&Var] {
    fn vars(&self) -> Vars<'_> {
        Vars::Collected(self.iter().map(|var| (*var).clone()).collect())
    }
}

impl Borrowed for [(String, Var)] {
    fn vars(&self) -> Vars<'_> {
        Vars::MadeNamed(self.to_vec().into())
    }
}

impl<T, const N: usize> Borrowed for [T; N]
where
    [T]: Borrowed,
{
    fn vars(&self) -> Vars<'_> {
        self.as_slice().vars()
    }
}

impl<T> Borrowed for Vec<T>
where
    [T]: Borrowed,
{
    fn vars(&self) -> Vars<'_> {
        self.as_slice().vars()
    }
}

impl Borrowed for NamedVars {
    fn vars(&self) -> Vars<'_> {
        Vars::Named(self)
    }
}

impl Borrowed for VarMap {
    fn vars(&self) -> Vars<'_> {
        Vars::MadeNamed(self.into())
    }
}
