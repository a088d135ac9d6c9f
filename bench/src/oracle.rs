//! The answers, worked out the slow and plain way.

/// The L2 norm in f64 with Neumaier's compensated sum.
pub(crate) fn l2_norm(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0f64, 0f64);
    for x in values {
        let square = x * x;
        let next = sum + square;
        lost += if sum >= square {
            (sum - next) + square
        } else {
            (square - next) + sum
        };
        sum = next;
    }
    (sum + lost).sqrt()
}

#[cfg(test)]
mod tests {
    #[test]
    fn small_terms_are_not_lost_beside_a_large_one() {
        let values = std::iter::once(1e8).chain(std::iter::repeat_n(1.0, 1_000_000));
        assert_eq!(super::l2_norm(values), (1e16f64 + 1e6).sqrt());
        assert_eq!(super::l2_norm([3.0, 4.0].into_iter()), 5.0);
    }
}
