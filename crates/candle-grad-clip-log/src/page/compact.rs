//! Numbers as the page's script reads them: short, and JSON also where they are not finite.

use serde::ser::{Serialize, SerializeSeq, Serializer};

/// y of a point: six digits, far more than a picture shows.
struct Value(f64);

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let value = self.0;
        if value.is_nan() {
            serializer.serialize_str("nan")
        } else if value.is_infinite() {
            serializer.serialize_str(if value > 0.0 { "inf" } else { "-inf" })
        } else if is_short_integer(value) {
            serializer.serialize_i64(value as i64)
        } else {
            let short = format!("{value:.5e}").parse().unwrap_or(value);
            if is_short_integer(short) {
                serializer.serialize_i64(short as i64)
            } else {
                serializer.serialize_f64(short)
            }
        }
    }
}

/// x of a point: a step stays exact however large it is.
struct Place(f64);

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const LARGEST_EXACT: f64 = 9_007_199_254_740_992.0;
        if !self.0.is_finite() {
            serializer.serialize_unit()
        } else if self.0.fract() == 0.0 && self.0.abs() <= LARGEST_EXACT {
            serializer.serialize_i64(self.0 as i64)
        } else {
            serializer.serialize_f64(self.0)
        }
    }
}

/// Whether it is shorter without a fraction: `3` for `3.0`.
fn is_short_integer(value: f64) -> bool {
    value.fract() == 0.0 && value.abs() < 1e6
}

/// One flat list: x, y, x, y, ...
pub(super) fn points<S: Serializer>(
    points: &[(f64, f64)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut list = serializer.serialize_seq(Some(2 * points.len()))?;
    for (x, y) in points {
        list.serialize_element(&Place(*x))?;
        list.serialize_element(&Value(*y))?;
    }
    list.end()
}

pub(super) fn levels<S: Serializer>(
    levels: &[(String, f64)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(levels.iter().map(|(name, level)| (name, Value(*level))))
}

pub(super) fn rows<S: Serializer>(
    rows: &[(String, Vec<Option<f64>>)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let cells = |cells: &[Option<f64>]| -> Vec<Option<Value>> {
        cells.iter().map(|cell| cell.map(Value)).collect()
    };
    serializer.collect_seq(rows.iter().map(|(name, row)| (name, cells(row))))
}
