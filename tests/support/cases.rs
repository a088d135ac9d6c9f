//! What all files of cases have in common. See `tests/cases/README.md`.

use candle_core::DType;
use half::{bf16, f16};
use serde::{Deserialize, Deserializer};

/// What one framework returned.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaseFile<C> {
    /// The framework's name.
    pub framework: String,
    /// Its version.
    pub version: String,
    /// What its norm clip adds to the norm; none where each case says so.
    #[serde(default)]
    pub eps: Option<f64>,
    /// The cases.
    pub cases: Vec<C>,
}

impl<'de, C: Deserialize<'de>> CaseFile<C> {
    /// Reads a file.
    ///
    /// # Errors
    /// A file that is not as described here.
    pub fn parse(text: &'de str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

/// Asserts that no case has failed.
///
/// # Panics
/// With the list of those that have.
#[track_caller]
pub fn assert_none(failures: &[String], of: usize, what: &str) {
    assert!(
        failures.is_empty(),
        "{} of {of} {what}:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// Asserts that at least so many cases are of a kind.
///
/// # Panics
/// If they are fewer.
#[track_caller]
pub fn at_least<'a, C: 'a>(
    least: usize,
    what: &str,
    cases: impl IntoIterator<Item = &'a C>,
    is: impl Fn(&C) -> bool,
) {
    let count = cases.into_iter().filter(|case| is(case)).count();
    assert!(count >= least, "{count} cases {what}, expected {least}");
}

/// A number of a JSON file, in which NaN and infinities are strings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Number(pub f64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(f64),
            Word(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(x) => Ok(Self(x)),
            Written::Word(word) => word.parse().map(Self).map_err(serde::de::Error::custom),
        }
    }
}

pub(crate) fn dtype<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
    let name = String::deserialize(deserializer)?;
    name.parse().map_err(serde::de::Error::custom)
}

/// The numbers that were meant: the shortest ones that become them in `dtype` are written.
pub(crate) fn in_dtype(written: &[Number], dtype: DType) -> Vec<f64> {
    let round = |x: &Number| match dtype {
        DType::F32 => f64::from(x.0 as f32),
        DType::F16 => f16::from_f64(x.0).to_f64(),
        DType::BF16 => bf16::from_f64(x.0).to_f64(),
        _ => x.0,
    };
    written.iter().map(round).collect()
}
