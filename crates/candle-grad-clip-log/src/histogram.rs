//! Histograms of tensors, as `TensorBoard` reads them.

use std::sync::LazyLock;

use candle_core::{DType, Result, Tensor};
use prost::Message;

/// `TensorFlow`'s `HistogramProto` (`summary.proto`).
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Histogram {
    /// The lowest value.
    #[prost(double, tag = "1")]
    pub(crate) min: f64,
    /// The highest value.
    #[prost(double, tag = "2")]
    pub(crate) max: f64,
    /// How many values there are.
    #[prost(double, tag = "3")]
    pub(crate) num: f64,
    /// Their sum.
    #[prost(double, tag = "4")]
    pub(crate) sum: f64,
    /// The sum of their squares.
    #[prost(double, tag = "5")]
    pub(crate) sum_squares: f64,
    /// The upper end of each bucket, which does not belong to it.
    #[prost(double, repeated, tag = "6")]
    pub(crate) bucket_limit: Vec<f64>,
    /// How many values are in each.
    #[prost(double, repeated, tag = "7")]
    pub(crate) bucket: Vec<f64>,
}

/// `TensorFlow`'s own bucket limits (`histogram.cc`): 1e-12 times powers of 1.1 up to 1e20, the
/// same below 0, and 0 between them.
static LIMITS: LazyLock<Vec<f64>> = LazyLock::new(|| {
    let powers = std::iter::successors(Some(1e-12), |limit| Some(limit * 1.1));
    let mut positive: Vec<f64> = powers.take_while(|limit| *limit < 1e20).collect();
    positive.push(f64::MAX);
    let negative = positive.iter().rev().map(|limit| -limit);
    negative
        .chain([0.0])
        .chain(positive.iter().copied())
        .collect()
});

impl Histogram {
    /// Counts the finite elements of a tensor.
    ///
    /// # Errors
    /// If it can't be read from its device.
    pub(crate) fn of_tensor(tensor: &Tensor) -> Result<Self> {
        let values = tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
        Ok(Self::of(&values))
    }

    /// Counts the finite ones of `values`.
    pub(crate) fn of(values: &[f64]) -> Self {
        let mut counts = vec![0.0; LIMITS.len()];
        let finite = || values.iter().copied().filter(|value| value.is_finite());
        for value in finite() {
            let bucket = LIMITS.partition_point(|limit| *limit <= value);
            counts[bucket.min(LIMITS.len() - 1)] += 1.0;
        }
        let (bucket_limit, bucket) = without_empty_rows(&counts);
        let num = finite().count() as f64;
        Self {
            min: if num > 0.0 {
                finite().fold(f64::INFINITY, f64::min)
            } else {
                0.0
            },
            max: if num > 0.0 {
                finite().fold(f64::NEG_INFINITY, f64::max)
            } else {
                0.0
            },
            num,
            sum: finite().sum(),
            sum_squares: finite().map(|value| value * value).sum(),
            bucket_limit,
            bucket,
        }
    }
}

/// Empty buckets side by side become one, as `TensorFlow` writes them.
fn without_empty_rows(counts: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let mut kept: Vec<(f64, f64)> = Vec::new();
    for (limit, count) in LIMITS.iter().zip(counts) {
        match kept.last_mut() {
            Some((last, 0.0)) if *count == 0.0 => *last = *limit,
            _ => kept.push((*limit, *count)),
        }
    }
    kept.into_iter().unzip()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// The number of values from `low` to below `high`, by the histogram.
    fn between(histogram: &Histogram, low: f64, high: f64) -> f64 {
        let buckets = histogram.bucket_limit.iter().zip(&histogram.bucket);
        let inside =
            buckets.filter(|(limit, _)| **limit > low * 1.000_001 && **limit <= high * 1.000_001);
        inside.map(|(_, count)| count).sum()
    }

    #[test]
    fn buckets_counted_by_hand() {
        // 1e-12 * 1.1^290 = 1.0090, 1.1^291: 1.1099; so 1 is in the bucket up to 1.0090, and 1.05,
        // 1.1 in the next.
        let values = [
            1.0,
            1.05,
            1.1,
            1.05,
            -1.0,
            0.0,
            2e-13,
            f64::NAN,
            f64::INFINITY,
        ];
        let histogram = Histogram::of(&values);
        let limit = |power| 1e-12 * 1.1f64.powi(power);
        let expected = [
            (-limit(290), 0.0), // -infinity to the bucket of -1
            (-limit(289), 1.0), // -1
            (-1e-12, 0.0),
            (0.0, 0.0),
            (1e-12, 2.0), // 0 and 2e-13
            (limit(289), 0.0),
            (limit(290), 1.0), // 1
            (limit(291), 3.0),
            (f64::MAX, 0.0),
        ];
        // The empty ones between -1 and 0 are one bucket.
        let expected: Vec<_> = expected
            .into_iter()
            .filter(|(limit, _)| *limit != -1e-12)
            .collect();
        assert_eq!(
            histogram.bucket,
            expected.iter().map(|(_, count)| *count).collect::<Vec<_>>()
        );
        for (ours, (limit, _)) in histogram.bucket_limit.iter().zip(&expected) {
            assert!(
                (ours - limit).abs() <= 1e-12 * limit.abs(),
                "{ours} {limit}"
            );
        }
        assert_eq!(
            (histogram.min, histogram.max, histogram.num),
            (-1.0, 1.1, 7.0)
        );
        assert!((histogram.sum - 3.2).abs() < 1e-12);
        assert!((histogram.sum_squares - (2.0 + 2.0 * 1.1025 + 1.21)).abs() < 1e-12);
    }

    #[test]
    fn every_finite_value_is_in_one_bucket() {
        let odd = [
            f64::MAX,
            f64::MIN,
            1e20,
            -1e20,
            5e-324,
            -5e-324,
            -0.0,
            1e-12,
            -1e-12,
        ];
        for value in odd {
            let histogram = Histogram::of(&[value]);
            assert_eq!(histogram.bucket.iter().sum::<f64>(), 1.0, "{value}");
        }
        let values: Vec<f64> = (0..1000).map(|n| f64::from(n) / 100.0 - 5.0).collect();
        let histogram = Histogram::of(&values);
        assert_eq!(histogram.bucket.iter().sum::<f64>(), 1000.0);
        assert!(histogram.bucket_limit.is_sorted_by(|a, b| a < b));
        let limit = 1e-12 * 1.1f64.powi(290);
        let counted = values
            .iter()
            .filter(|value| (1e-12..limit).contains(*value))
            .count();
        assert!(counted > 90);
        assert_eq!(between(&histogram, 1e-12, limit), counted as f64);
        assert_eq!(Histogram::of(&[]).num, 0.0);
        assert_eq!(Histogram::of(&[f64::NAN]).num, 0.0);
    }

    #[test]
    fn a_tensor_of_any_type_and_shape_is_counted() {
        let values = [0.5, -0.25, 1.0, 0.0, 2.0, 2.0];
        let tensor = Tensor::new(&values, &Device::Cpu)
            .unwrap()
            .reshape((2, 3))
            .unwrap();
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let tensor = tensor.to_dtype(dtype).unwrap().t().unwrap();
            assert_eq!(
                Histogram::of_tensor(&tensor).unwrap(),
                Histogram::of(&values)
            );
        }
    }
}
