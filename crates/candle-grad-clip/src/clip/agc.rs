//! Adaptive gradient clipping (AGC): limits the gradient norm of a unit relative to the norm of its
//! weights.
//!
//! Brock, De, Smith, Simonyan (2021), "High-performance large-scale image recognition without
//! normalization", arXiv 2102.06171, eq. 3; `timm.utils.agc` and `optax.adaptive_grad_clip`.

use std::fmt;
use std::sync::Arc;

use candle_core::Var;
use candle_grad_clip_kernels::Units;
use wildmatch::WildMatch;

use super::coef::{clip_coef, smaller};
use super::decision::{Decision, Given};
use super::edits::{Edits, UnitEdits};
use super::options::{Options, Writer};
use super::per_var::scaled_norm;
use super::rule::{Method, Rule, Scope};
use crate::check::check_limit;
use crate::error::{Error, Result};
use crate::gradients::UnitPlan;
use crate::vars::{NamedVars, check_patterns};

/// Adaptive gradient clipping ([`Clip::agc`](crate::Clip::agc)): limits the gradient norm of each
/// unit `i` of each Var relative to the norm of the unit's weights.
///
/// ```text
/// g_i <- g_i * min(1, clipping * max(|w_i|, eps) / |g_i|)
/// ```
///
/// [`AgcUnits`] defines the units. By default a unit is a row of a weight matrix, which computes
/// one output in candle's layout. The paper excludes the last linear layer (`exclude`). The weights
/// are read in each step as well, so measuring takes about twice as long as for a norm clip.
/// [`StepReport::clip_coef`](crate::StepReport::clip_coef) is the smallest of the coefficients, and
/// [`StepRecord::num_clipped`](crate::StepRecord::num_clipped) counts the units that were clipped.
///
/// # References
/// Brock and others (2021), arXiv 2102.06171: clipping 0.01 for small batches, 0.08 and more for
/// large ones. (timm and optax also keep `|g_i|` above 1e-6, which matters only if `clipping * eps`
/// is below 1e-6.)
///
/// ```
/// use candle_grad_clip::{Agc, Clip};
///
/// let clip = Clip::from(Agc { clipping: 0.02, exclude: vec!["head.*".into()], ..Agc::default() });
/// assert_eq!(clip.to_string(), "agc:clipping=0.02,exclude=head.*");
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Agc {
    /// The limit, relative to the weights' norm. Default: 0.01.
    pub clipping: f64,
    /// Lower bound of the weights' norm, so that weights of zero can grow. Above 0. Default: 1e-3.
    pub eps: f64,
    /// The units. Default: [`AgcUnits::Rows`].
    pub units: AgcUnits,
    /// Vars that are not clipped, by patterns that match their whole name (`*`: any characters,
    /// `?`: one). Default: none.
    pub exclude: Vec<String>,
}

/// The units of [`Agc`]. A Var of rank 0 or 1 is always one unit.
///
/// ```
/// use candle_grad_clip::{Agc, AgcUnits, Clip};
///
/// let clip = Clip::from(Agc { units: AgcUnits::Optax, ..Agc::default() });
/// assert_eq!(clip.to_string(), "agc:units=optax");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum AgcUnits {
    /// Each index of the first dimension, as in timm. For candle's and PyTorch's layouts, (out, in)
    /// and (out, in, height, width).
    #[default]
    Rows,
    /// Each index of the last dimension. For the layouts of JAX, (in, out) and (height, width, in,
    /// out).
    Columns,
    /// As optax without an `axis`, for the layouts of JAX. Ranks 2 and 3: all but the first
    /// dimension. Rank 4: each index of the last dimension. A Var with at most one dimension above
    /// 1 is one unit. Other ranks are an error.
    Optax,
}

impl Default for Agc {
    fn default() -> Self {
        Self {
            clipping: 0.01,
            eps: 1e-3,
            units: AgcUnits::Rows,
            exclude: Vec::new(),
        }
    }
}

const UNITS: &[(&str, AgcUnits)] = &[
    ("rows", AgcUnits::Rows),
    ("columns", AgcUnits::Columns),
    ("optax", AgcUnits::Optax),
];

/// In a [`Clip`](crate::Clip), the clip's `eps` is used, and this field stays at its default.
impl Method for Agc {
    fn parse(options: &mut Options<'_>) -> Result<Self> {
        let default = Self::default();
        let exclude = options.take::<String>("exclude", "patterns of names")?;
        let patterns = exclude.iter().flat_map(|text| text.split('|'));
        Ok(Self {
            clipping: options.number("clipping", default.clipping)?,
            eps: default.eps,
            units: options.word("units", UNITS, default.units)?,
            exclude: patterns.map(ToString::to_string).collect(),
        })
    }

    fn write(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let default = Self::default();
        out.option("clipping", self.clipping, default.clipping)?;
        out.word("units", UNITS, &self.units, &default.units)?;
        out.option("exclude", self.exclude.join("|").as_str(), "")
    }

    fn default_eps(&self) -> f64 {
        Self::default().eps
    }

    fn check(&self, eps: f64) -> Result<()> {
        check_limit("clipping", self.clipping)?;
        check_limit("eps", eps)?;
        for pattern in &self.exclude {
            // Otherwise the clip could not be written as text.
            if pattern.is_empty()
                || pattern.contains(|c: char| ",+|".contains(c) || c.is_whitespace())
            {
                return Err(Error::InvalidClip {
                    text: format!("agc:exclude={}", self.exclude.join("|")),
                    reason: format!(
                        "pattern `{pattern}` is empty or has a space, `,`, `+` or `|`: write `?` for one character"
                    ),
                });
            }
        }
        Ok(())
    }

    fn scope(&self) -> Scope {
        Scope::Units {
            clipping: self.clipping,
        }
    }

    fn start(&self) -> Box<dyn Rule> {
        Box::new(self.clone())
    }

    fn unit_plan(&self, vars: &NamedVars) -> Result<Option<Arc<UnitPlan>>> {
        check_patterns("exclude of agc", &self.exclude, vars.names())?;
        let patterns = self.exclude.iter().map(|text| WildMatch::new(text));
        let patterns: Vec<WildMatch> = patterns.collect();
        let mut parts = Vec::new();
        for (var, name) in vars.vars().iter().zip(vars.names()) {
            let excluded = patterns.iter().any(|pattern| pattern.matches(name));
            let whole = Units::Rows(var.elem_count());
            let units = if excluded {
                whole
            } else {
                self.units_of(var, name)?
            };
            parts.push((units, var.elem_count(), excluded));
        }
        Ok(Some(Arc::new(UnitPlan::new(parts.into_iter()))))
    }
}

impl Agc {
    fn units_of(&self, var: &Var, name: &str) -> Result<Units> {
        let (dims, elements) = (var.dims(), var.elem_count());
        let whole = Units::Rows(elements);
        let (Some(first), Some(last)) = (dims.first(), dims.last()) else {
            return Ok(whole);
        };
        let above_one = dims.iter().filter(|n| **n != 1).count();
        Ok(match self.units {
            _ if dims.len() == 1 || elements == 0 => whole,
            AgcUnits::Rows => Units::Rows(elements / first),
            AgcUnits::Columns => Units::Columns(*last),
            AgcUnits::Optax if above_one <= 1 => whole,
            AgcUnits::Optax if dims.len() <= 3 => Units::Columns(elements / first),
            AgcUnits::Optax if dims.len() == 4 => Units::Columns(*last),
            AgcUnits::Optax => {
                return Err(Error::AgcRank {
                    var: name.to_string(),
                    shape: dims.to_vec(),
                });
            }
        })
    }
}

impl Rule for Agc {
    fn decide(&mut self, given: &Given<'_>) -> Decision {
        let (measured, zero_non_finite) = (given.measured, given.zero_non_finite);
        let Some(units) = &measured.units else {
            // Not reached: the units of `unit_plan` are measured.
            return Decision::scale(given, 1.0);
        };
        let norm_type = measured.norm_type;
        let mut coefs = vec![1.0; units.grads.len()];
        for (index, entry) in measured.entries.iter().enumerate() {
            if entry.grad.is_none() || units.plan.is_excluded(index) {
                continue;
            }
            for unit in units.plan.range(index) {
                let weight_norm = units.weights[unit].power.root(norm_type).value();
                let max_norm = self.clipping * weight_norm.max(given.eps);
                let stats = units.grads[unit];
                coefs[unit] = clip_coef(stats, norm_type, max_norm, 0.0, zero_non_finite);
            }
        }
        let num_clipped = coefs.iter().filter(|coef| **coef != 1.0).count() as u64;
        let parts = units.grads.iter().zip(&coefs);
        let parts = parts.map(|(stats, coef)| (stats.power, *coef));
        let clip_coef = coefs.iter().copied().fold(1.0, |x, y| smaller(y, x));
        let clipped_norm = scaled_norm(given, parts);
        let edits = (num_clipped > 0 || zero_non_finite).then(|| {
            Edits::PerUnit(UnitEdits {
                plan: units.plan.clone(),
                coefs,
                zero_non_finite,
            })
        });
        Decision {
            was_clipped: num_clipped > 0,
            num_clipped,
            ..Decision::new(edits, clip_coef, clipped_norm)
        }
    }
}
