//! How far parameters end from where PyTorch's do, and how far they may.

use candle_core::DType;

use crate::cases::in_dtype;
use crate::optimizer_cases::{OptimCase, Outcome};

/// A number beside the one that was expected.
#[derive(Debug)]
pub struct Difference {
    /// Which number.
    pub what: String,
    /// The parameter's dtype; none of a norm.
    pub dtype: Option<DType>,
    /// Where no error is allowed, 0 or infinite; else the difference as a share of what is allowed.
    pub of_allowed: f64,
}

impl Difference {
    /// Whether it is too large. NaN is.
    #[must_use]
    pub fn is_fault(&self) -> bool {
        self.of_allowed.is_nan() || self.of_allowed > 1.0
    }
}

impl OptimCase {
    /// How far each number is from the expected one.
    ///
    /// # Panics
    /// If there are more or fewer than expected.
    #[must_use]
    pub fn differences(&self, outcome: &Outcome) -> Vec<Difference> {
        let mut differences = Vec::new();
        let norms = self.total_norms.as_deref().unwrap_or_default();
        let id = &self.id;
        assert_eq!(outcome.total_norms.len(), norms.len(), "{id}: norms");
        assert_eq!(outcome.ends.len(), self.tensors.len(), "{id}: parameters");
        let relative = self.tensors.iter().map(|one| Row::of(one.dtype).norm);
        let relative = relative.fold(0.0, f64::max);
        for (step, (ours, theirs)) in outcome.total_norms.iter().zip(norms).enumerate() {
            differences.push(Difference {
                what: format!("norm of step {step}: {ours:e}, expected {:e}", theirs.0),
                dtype: None,
                of_allowed: share(*ours, theirs.0, relative * theirs.0),
            });
        }
        for (index, (ours, one)) in outcome.ends.iter().zip(&self.tensors).enumerate() {
            let theirs = in_dtype(&one.end, one.dtype);
            assert_eq!(ours.len(), theirs.len(), "{id}: elements of {index}");
            for (at, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                let allowed = self.allowed(index, at);
                differences.push(Difference {
                    what: format!("element {at} of {index}: {ours:e}, expected {theirs:e}"),
                    dtype: Some(one.dtype),
                    of_allowed: share(*ours, theirs, allowed),
                });
            }
        }
        differences
    }

    /// How far an element may be from where it should end.
    #[must_use]
    pub fn allowed(&self, index: usize, at: usize) -> f64 {
        let one = &self.tensors[index];
        let reach = one.reach.as_ref().map_or(0.0, |reach| reach[at].0);
        let lrs = (0..self.steps()).map(|step| self.lr(step));
        let on_the_way = [one.start[at].0.abs(), one.end[at].0.abs(), reach];
        let scale = on_the_way.into_iter().chain(lrs).fold(0.0, f64::max);
        Row::of(one.dtype).relative(self.steps()) * scale
    }
}

/// A difference as a share of the one that is allowed; 0 for the same number or NaN.
fn share(ours: f64, theirs: f64, allowed: f64) -> f64 {
    if ours == theirs || (ours.is_nan() && theirs.is_nan()) {
        0.0
    } else if ours.is_finite() && theirs.is_finite() {
        (ours - theirs).abs() / allowed
    } else {
        f64::INFINITY
    }
}

/// A row of `TOLERANCES`. All but `norm` are relative to the largest of the magnitudes that the
/// element had on its way and of the learning rates, as an update's error is relative to these.
#[derive(Debug, Clone, Copy)]
struct Row {
    dtype: DType,
    /// After any number of steps.
    a_run: f64,
    /// More for each step.
    a_step: f64,
    /// Relative, of a norm: PyTorch's is an f32 sum, of halves as well, and so is that of the
    /// composed backend.
    norm: f64,
}

/// The one table of tolerances.
///
/// - f64: 20 steps of a few roundings of 1.1e-16 leave a wide margin.
/// - f32: 2 units in the last place a step (a unit is at most 2^-23 of the number): PyTorch and we
///   order the operations differently, and PyTorch's CPU code fuses some multiplications and
///   additions. PyTorch is up to 0.46 of this from the f64 formulas, and we up to 0.40 from it. A
///   norm of a few elements that is measured in f32 adds a rounding or two.
/// - bf16 and f16: the same bits. One rounding of an f32 result to the half hides errors in f32;
///   the generator leaves out runs with a number so near the middle of two halves that twice f32's
///   tolerance could tip it.
#[rustfmt::skip]
const TOLERANCES: [Row; 4] = [
    Row { dtype: DType::F64,  a_run: 1e-12, a_step: 0.0,               norm: 1e-12 },
    Row { dtype: DType::F32,  a_run: 0.0,   a_step: 1.0 / 4_194_304.0, norm: 1e-6 },
    Row { dtype: DType::F16,  a_run: 0.0,   a_step: 0.0,               norm: 1e-6 },
    Row { dtype: DType::BF16, a_run: 0.0,   a_step: 0.0,               norm: 1e-6 },
];

impl Row {
    fn of(dtype: DType) -> Self {
        let row = TOLERANCES.into_iter().find(|row| row.dtype == dtype);
        row.expect("one of the four dtypes")
    }

    fn relative(self, steps: usize) -> f64 {
        self.a_run + self.a_step * steps as f64
    }
}
