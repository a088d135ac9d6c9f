//! The plain equations that the library is compared with.

use candle_core::DType;

/// `(sum |x|^p)^(1/p)`, or the largest `|x|` for an infinite `p`: divided by the largest, so that
/// no power overflows, and summed with Neumaier's compensation. NaN if any is.
#[must_use]
pub fn norm(values: &[f64], p: f64) -> f64 {
    if values.iter().any(|x| x.is_nan()) {
        return f64::NAN;
    }
    let largest = values.iter().fold(0f64, |max, x| max.max(x.abs()));
    if largest == 0.0 || largest.is_infinite() || p == f64::INFINITY {
        return largest;
    }
    let (mut sum, mut lost) = (0f64, 0f64);
    for x in values {
        let term = (x.abs() / largest).powf(p);
        let next = sum + term;
        lost += if sum >= term {
            (sum - next) + term
        } else {
            (term - next) + sum
        };
        sum = next;
    }
    largest * (sum + lost).powf(p.recip())
}

/// `min(1, max_norm / (total_norm + eps))`; NaN for a norm that is.
#[must_use]
pub fn clip_coef(total_norm: f64, max_norm: f64, eps: f64) -> f64 {
    let ratio = max_norm / (total_norm + eps);
    if ratio > 1.0 { 1.0 } else { ratio }
}

/// What a dtype costs: the relative rounding error of one operation, with a little room, and the
/// smallest number above 0, below which the error is no longer relative.
const ROUNDING: [(DType, f64, f64); 4] = [
    (DType::F64, 1e-12, 5e-324),
    (DType::F32, 1e-6, 1.5e-45),
    (DType::F16, 2e-3, 6e-8),
    (DType::BF16, 1.6e-2, 9.2e-41),
];

/// Of a dtype that is not in the table: as bf16.
fn rounding(dtype: DType) -> (f64, f64) {
    let row = ROUNDING.into_iter().find(|row| row.0 == dtype);
    let (_, tolerance, floor) = row.unwrap_or(ROUNDING[3]);
    (tolerance, floor)
}

/// Relative rounding error of one operation in a dtype, with a little room.
#[must_use]
pub fn tolerance(dtype: DType) -> f64 {
    rounding(dtype).0
}

/// The smallest number above 0 in a dtype: the absolute error of one rounding near 0.
#[must_use]
pub fn floor(dtype: DType) -> f64 {
    rounding(dtype).1
}

/// Asserts `|ours - right| <= tolerance * |right|`, which NaN fails.
///
/// # Panics
/// If it is not so.
#[track_caller]
pub fn assert_close(ours: f64, right: f64, tolerance: f64, what: &str) {
    let error = (ours - right).abs();
    let allowed = tolerance * right.abs();
    assert!(
        error <= allowed,
        "{what}: {ours:e}, expected {right:e} within {allowed:e}"
    );
}

/// As [`assert_close`], of every element: relative to each, so that a right value of 0 is met
/// exactly.
///
/// # Panics
/// If it is not so.
#[track_caller]
pub fn assert_all_close(ours: &[f64], right: &[f64], tolerance: f64, what: &str) {
    assert_all_close_above(ours, right, tolerance, 0.0, what);
}

/// As [`assert_all_close`], but errors up to `floor` are allowed whatever the value: [`floor`] of a
/// dtype where results may fall below its normal numbers.
///
/// # Panics
/// If it is not so.
#[track_caller]
pub fn assert_all_close_above(ours: &[f64], right: &[f64], tolerance: f64, floor: f64, what: &str) {
    assert_eq!(ours.len(), right.len(), "{what}: lengths");
    for (i, (x, y)) in ours.iter().zip(right).enumerate() {
        let (error, allowed) = ((x - y).abs(), (tolerance * y.abs()).max(floor));
        assert!(
            error <= allowed,
            "{what}: element {i} is {x:e}, expected {y:e} within {allowed:e}"
        );
    }
}
