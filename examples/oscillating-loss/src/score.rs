//! What a run's numbers say: roughness, medians, the usable range of learning rates.

/// A loss within this factor of the best one counts as usable.
pub const USABLE_WITHIN: f64 = 1.2;

/// Mean of |log(L_t / L_{t-1})| over the second half of the test losses: 0 for a flat curve, 0.1 for
/// one that jumps by about 10 % from one evaluation to the next.
///
/// None if there are fewer than two losses in that half, or one of them is not finite.
#[must_use]
pub fn roughness(test_losses: &[f64]) -> Option<f64> {
    let half = &test_losses[test_losses.len() / 2..];
    let jumps: Vec<f64> = half
        .windows(2)
        .map(|pair| (pair[1] / pair[0]).ln().abs())
        .collect();
    let mean = jumps.iter().sum::<f64>() / jumps.len() as f64;
    mean.is_finite().then_some(mean)
}

/// The middle value, or the mean of the two middle ones; a diverged run takes part as infinity.
///
/// None for no values.
#[must_use]
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let (low, high) = (
        values.get(values.len().checked_sub(1)? / 2)?,
        values.get(values.len() / 2)?,
    );
    Some(f64::midpoint(*low, *high))
}

/// The widest unbroken row of learning rates that all reach a loss of at most
/// [`USABLE_WITHIN`] x `best`: the lowest and the highest of them.
///
/// `curve` holds (learning rate, loss), rates ascending, infinite losses for diverged runs. Only rates
/// that were run count: nothing is interpolated, so the real range may reach further on both
/// sides by less than one step of the grid, for every arm alike.
#[must_use]
pub fn usable_range(curve: &[(f64, f64)], best: f64) -> Option<(f64, f64)> {
    curve
        .chunk_by(|a, b| usable(a.1, best) == usable(b.1, best))
        .filter(|row| usable(row[0].1, best))
        .map(|row| (row[0].0, row[row.len() - 1].0))
        .reduce(|widest, row| {
            if decades(row) > decades(widest) {
                row
            } else {
                widest
            }
        })
}

fn usable(loss: f64, best: f64) -> bool {
    loss <= USABLE_WITHIN * best
}

/// Width of a range of learning rates, in powers of ten.
#[must_use]
pub fn decades((low, high): (f64, f64)) -> f64 {
    (high / low).log10()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roughness_is_the_mean_log_jump_of_the_second_half() {
        // The wild first half doesn't count; then 1 -> 2 -> 1 jumps by log 2 twice.
        let rough = roughness(&[9.0, 1e9, 0.1, 1.0, 2.0, 1.0]).unwrap_or(f64::NAN);
        assert!((rough - 2f64.ln()).abs() < 1e-12, "{rough}");
        let flat = roughness(&[3.0, 1.0, 1.0, 1.0]).unwrap_or(f64::NAN);
        assert!(flat == 0.0, "{flat}");
    }

    #[test]
    fn roughness_needs_two_finite_losses() {
        assert_eq!(roughness(&[]), None);
        assert_eq!(roughness(&[1.0, 2.0]), None);
        assert_eq!(roughness(&[1.0, 1.0, 1.0, f64::NAN]), None);
        assert_eq!(roughness(&[1.0, 1.0, 1.0, f64::INFINITY]), None);
    }

    #[test]
    fn median_of_even_odd_none_and_diverged() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0]), Some(2.5));
        assert_eq!(median([]), None);
        assert_eq!(median([1.0, f64::INFINITY]), Some(f64::INFINITY));
    }

    #[test]
    fn usable_range_is_the_widest_unbroken_row() {
        let curve = |losses: [f64; 6]| {
            let rates = [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1];
            rates.into_iter().zip(losses).collect::<Vec<_>>()
        };
        let inf = f64::INFINITY;
        // The losses of the issue that asked for this: PyTorch, SGD, power 4.
        let none = curve([0.6, 0.139, 0.100, inf, inf, inf]);
        let norm = curve([2.08, 0.106, 0.093, 0.091, 0.107, 0.111]);
        assert_eq!(usable_range(&none, 0.091), Some((3e-3, 3e-3)));
        assert_eq!(usable_range(&norm, 0.091), Some((1e-3, 3e-2)));
        let gap = curve([1.0, 1.0, inf, 1.0, 1.0, 1.0]);
        assert_eq!(usable_range(&gap, 1.0), Some((1e-2, 1e-1)));
        assert_eq!(usable_range(&curve([inf; 6]), 1.0), None);
        assert!((decades((1e-3, 3e-2)) - 1.477).abs() < 1e-3);
    }

    #[test]
    fn the_border_of_usable_counts() {
        assert_eq!(
            usable_range(&[(0.1, 1.2), (1.0, 1.2000001)], 1.0),
            Some((0.1, 0.1))
        );
    }
}
