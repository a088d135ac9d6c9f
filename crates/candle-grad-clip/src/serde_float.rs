//! Floats that survive JSON, which has no NaN and no infinity: there they are strings.

use serde::{Deserialize, Deserializer, Serializer};

/// The serialised form: a number, or in human-readable formats "NaN", "inf" or "-inf".
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(f64),
    Text(String),
}

// serde passes a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
pub(crate) fn serialize<S: Serializer>(x: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if serializer.is_human_readable() && !x.is_finite() {
        serializer.collect_str(x)
    } else {
        serializer.serialize_f64(*x)
    }
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    if !deserializer.is_human_readable() {
        return f64::deserialize(deserializer);
    }
    match Written::deserialize(deserializer)? {
        Written::Number(x) => Ok(x),
        Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

/// The same for named floats.
#[cfg(feature = "serde")]
pub(crate) mod named {
    use serde::Serialize;

    use super::{Deserialize, Deserializer, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Float(#[serde(with = "super")] f64);

    pub(crate) fn serialize<S: Serializer>(
        named: &[(String, f64)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(named.iter().map(|(name, x)| (name, Float(*x))))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(String, f64)>, D::Error> {
        let named = Vec::<(String, Float)>::deserialize(deserializer)?;
        Ok(named.into_iter().map(|(name, x)| (name, x.0)).collect())
    }
}
