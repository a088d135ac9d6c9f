//! The reference cases: what other frameworks return, as data. See `tests/cases/README.md`.

use crate::device::{device, kernels};
use candle_core::backprop::GradStore;
use candle_core::{DType, Var};
use candle_grad_clip::backend::Backend;
use candle_grad_clip::{
    ClipGradNorm, NonFinite, NormType, clip_by_global_norm, clip_grad_norm_with, clip_grad_value,
    clip_grads_with_norm, total_norm,
};
use serde::Deserialize;

use crate::cases::{CaseFile, Number, dtype, in_dtype};
use crate::gradients::{empty_store, tensor, values};

/// Gradients, what to do to them, and what comes out.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// Says where it comes from and what is in it.
    pub id: String,
    /// The function of ours.
    pub op: Op,
    /// The norm's order; none where no norm is taken.
    #[serde(default)]
    pub norm_type: Option<Number>,
    /// The limit; none where nothing is clipped.
    #[serde(default)]
    pub limit: Option<Number>,
    /// The norm that is handed in.
    #[serde(default)]
    pub known_norm: Option<Number>,
    /// `Propagate` where elements are not finite.
    pub policy: Policy,
    /// Why the framework's answer is not ours.
    #[serde(default)]
    pub differs: Option<String>,
    /// The norm in exact arithmetic.
    #[serde(default)]
    pub exact_norm: Option<Number>,
    /// The norm that the framework returned.
    #[serde(default)]
    pub total_norm: Option<Number>,
    /// One for each parameter.
    pub tensors: Vec<CaseTensor>,
}

/// One parameter's gradient.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaseTensor {
    #[serde(deserialize_with = "dtype")]
    /// The dtype.
    pub dtype: DType,
    /// The shape.
    pub shape: Vec<usize>,
    /// The gradient before; none if the parameter got none.
    pub grad: Option<Vec<Number>>,
    /// The gradient after.
    #[serde(default)]
    pub expect: Option<Vec<Number>>,
    /// The framework's gradient after, in a case that differs.
    #[serde(default)]
    pub theirs: Option<Vec<Number>>,
}

/// A function of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Op {
    TotalNorm,
    ClipGradNorm,
    ClipGradValue,
    ClipGradsWithNorm,
    ClipByGlobalNorm,
}

/// [`NonFinite`], as far as cases name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Policy {
    Error,
    Propagate,
}

/// All files.
///
/// # Errors
/// A file that is not as described here.
pub fn all() -> serde_json::Result<Vec<CaseFile<Case>>> {
    let texts = [
        include_str!("../cases/pytorch.json"),
        include_str!("../cases/tensorflow.json"),
        include_str!("../cases/optax.json"),
    ];
    texts.into_iter().map(CaseFile::parse).collect()
}

/// What came out: the norm, where one is returned, and each Var's gradient.
#[derive(Debug)]
pub struct Outcome {
    /// What the function returned.
    pub total_norm: Option<f64>,
    /// The gradients after.
    pub grads: Vec<Option<Vec<f64>>>,
}

impl Case {
    /// Vars, and a store with the gradients before.
    ///
    /// # Errors
    /// Those of candle.
    pub fn store(&self) -> candle_core::Result<(Vec<Var>, GradStore)> {
        let (mut vars, mut grads) = (Vec::new(), empty_store()?);
        for one in &self.tensors {
            let shape = one.shape.as_slice();
            let var = Var::zeros(shape, one.dtype, device())?;
            if let Some(grad) = &one.grad {
                grads.insert(&var, tensor(&in_dtype(grad, one.dtype), shape, one.dtype)?);
            }
            vars.push(var);
        }
        Ok((vars, grads))
    }

    /// Calls the function.
    ///
    /// # Errors
    /// Those of the library.
    pub fn run(&self, eps: f64, non_finite: NonFinite) -> candle_grad_clip::Result<Outcome> {
        let (vars, mut grads) = self.store()?;
        let total_norm = self.call(&vars, &mut grads, eps, non_finite)?;
        let after = |var: &Var| grads.get(var).map(values).transpose();
        Ok(Outcome {
            total_norm,
            grads: vars.iter().map(after).collect::<candle_core::Result<_>>()?,
        })
    }

    /// Calls the function on `grads`.
    ///
    /// # Errors
    /// Those of the library.
    pub fn call(
        &self,
        vars: &[Var],
        grads: &mut GradStore,
        eps: f64,
        non_finite: NonFinite,
    ) -> candle_grad_clip::Result<Option<f64>> {
        let or_nan = |number: Option<Number>| number.map_or(f64::NAN, |x| x.0);
        let (limit, known_norm) = (or_nan(self.limit), self.known_norm);
        let norm_type = NormType::from(or_nan(self.norm_type));
        match self.op {
            Op::TotalNorm => total_norm(grads, vars, norm_type).map(Some),
            Op::ClipGradNorm => {
                let options = ClipGradNorm {
                    max_norm: limit,
                    norm_type,
                    eps,
                    non_finite,
                };
                clip_grad_norm_with(grads, vars, &options).map(Some)
            }
            Op::ClipGradValue => clip_grad_value(grads, vars, limit).map(|()| None),
            Op::ClipGradsWithNorm => {
                clip_grads_with_norm(grads, vars, limit, or_nan(known_norm)).map(|()| None)
            }
            Op::ClipByGlobalNorm => {
                let known_norm = known_norm.map(|x| x.0);
                let (clipped, norm) = clip_by_global_norm(grads, vars, limit, known_norm)?;
                *grads = clipped;
                Ok(Some(norm))
            }
        }
    }

    /// What is not as it should be, in words; empty if all is.
    #[must_use]
    pub fn faults(&self, outcome: &Outcome, backend: Backend) -> Vec<String> {
        let mut faults = Vec::new();
        let norm_tolerance = self.widest(|row| row.norm(backend));
        match (outcome.total_norm, self.exact_norm) {
            (Some(ours), Some(exact)) if !norm_tolerance.allows(ours, exact.0) => {
                faults.push(format!("norm {ours:e}, exact {:e}", exact.0));
            }
            (Some(_), Some(_)) | (None, None) => {}
            (ours, exact) => faults.push(format!("norm {ours:?}, exact {exact:?}")),
        }
        if let (Some(ours), Some(theirs), None) =
            (outcome.total_norm, self.total_norm, &self.differs)
            && !self
                .widest(|row| row.grad(kernels()))
                .allows(ours, theirs.0)
        {
            faults.push(format!("norm {ours:e}, the framework's {:e}", theirs.0));
        }
        for (index, (ours, one)) in outcome.grads.iter().zip(&self.tensors).enumerate() {
            // The coefficient is as exact as the norm is.
            let tolerance = Row::of(one.dtype).grad(backend).or(norm_tolerance);
            let expect = one.expect.as_ref().or(one.grad.as_ref());
            let expect = expect.map(|expect| in_dtype(expect, one.dtype));
            if !all_within(tolerance, ours.as_deref(), expect.as_deref()) {
                faults.push(format!("gradient {index}: {ours:?}, expected {expect:?}"));
            }
        }
        faults
    }

    /// Whether the framework's answer is ours.
    #[must_use]
    pub fn framework_agrees(&self, outcome: &Outcome) -> bool {
        let tolerance = self.widest(|row| row.grad(kernels()));
        let norm_agrees = match (outcome.total_norm, self.total_norm) {
            (Some(ours), Some(theirs)) => tolerance.allows(theirs.0, ours),
            _ => true,
        };
        let grads_agree = outcome.grads.iter().zip(&self.tensors).all(|(ours, one)| {
            let tolerance = Row::of(one.dtype).grad(kernels());
            let theirs = one
                .theirs
                .as_ref()
                .map(|theirs| in_dtype(theirs, one.dtype));
            theirs.is_none() || all_within(tolerance, theirs.as_deref(), ours.as_deref())
        });
        norm_agrees && grads_agree
    }

    fn widest(&self, tolerance: impl Fn(Row) -> Tolerance) -> Tolerance {
        let none = Tolerance {
            relative: 0.0,
            smallest: 0.0,
        };
        let of_tensors = self.tensors.iter().map(|one| tolerance(Row::of(one.dtype)));
        of_tensors.fold(none, Tolerance::or)
    }
}

/// `None` is a gradient that is missing.
fn all_within(tolerance: Tolerance, got: Option<&[f64]>, expect: Option<&[f64]>) -> bool {
    match (got, expect) {
        (None, None) => true,
        (Some(got), Some(expect)) => {
            let mut pairs = got.iter().zip(expect);
            got.len() == expect.len() && pairs.all(|(x, y)| tolerance.allows(*x, *y))
        }
        _ => false,
    }
}

/// A row of `TOLERANCES`.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    dtype: DType,
    /// Relative, of a gradient after it was clipped: the dtype's rounding.
    cpu: f64,
    /// The same from the composed backend, which widens halves to f32 and no further.
    composed: f64,
    /// Relative, of the norm.
    cpu_norm: f64,
    composed_norm: f64,
    /// The smallest subnormal number: down there a relative error means nothing.
    smallest: f64,
}

/// The one table of tolerances. A half's is one unit in the last place.
#[rustfmt::skip]
const TOLERANCES: [Row; 4] = [
    Row { dtype: DType::F64,  cpu: 1e-12, composed: 1e-12, cpu_norm: 1e-12, composed_norm: 1e-12, smallest: 5e-324 },
    Row { dtype: DType::F32,  cpu: 1e-6,  composed: 2e-6,  cpu_norm: 1e-12, composed_norm: 2e-6,  smallest: 1.5e-45 },
    Row { dtype: DType::F16,  cpu: 1e-3,  composed: 1e-3,  cpu_norm: 1e-12, composed_norm: 2e-6,  smallest: 6e-8 },
    Row { dtype: DType::BF16, cpu: 8e-3,  composed: 8e-3,  cpu_norm: 1e-12, composed_norm: 2e-6,  smallest: 9.2e-41 },
];

impl Row {
    /// The dtype's row.
    ///
    /// # Panics
    /// If it has none.
    #[must_use]
    pub fn of(dtype: DType) -> Self {
        let row = TOLERANCES.into_iter().find(|row| row.dtype == dtype);
        row.expect("one of the four dtypes")
    }

    fn grad(self, backend: Backend) -> Tolerance {
        let relative = match backend {
            Backend::CandleOps => self.composed,
            _ => self.cpu,
        };
        Tolerance {
            relative,
            smallest: self.smallest,
        }
    }

    /// Norms are f64 numbers, also those of small dtypes.
    fn norm(self, backend: Backend) -> Tolerance {
        let relative = match backend {
            Backend::CandleOps => self.composed_norm,
            _ => self.cpu_norm,
        };
        Tolerance {
            relative,
            smallest: 5e-324,
        }
    }
}

/// How far a number may be from the expected one.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    relative: f64,
    smallest: f64,
}

impl Tolerance {
    /// Whether `got` is `expected`: NaN only where that is NaN, and infinite only where that is.
    #[must_use]
    #[allow(clippy::float_cmp)] // infinities are equal or they are not
    pub fn allows(self, got: f64, expected: f64) -> bool {
        if expected.is_nan() {
            return got.is_nan();
        }
        if expected.is_infinite() || got.is_infinite() {
            return got == expected;
        }
        // NaN fails this.
        (got - expected).abs() <= self.relative * expected.abs() + self.smallest
    }

    /// The wider of both.
    #[must_use]
    fn or(self, other: Self) -> Self {
        Self {
            relative: self.relative.max(other.relative),
            smallest: self.smallest.max(other.smallest),
        }
    }
}
