//! What a run's numbers say: roughness, medians, the usable range of learning rates.

/// A loss within this factor of the best one counts as usable.
pub const USABLE_WITHIN: f64 = 1.2;

/// Mean of `|log(L_t / L_{t-1})|` over the second half of the test losses: 0 for a flat curve, 0.1
/// for one that jumps by about 10 % from one evaluation to the next.
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

/// The lowest and the highest learning rate of the widest unbroken row of rates whose loss is at
/// most [`USABLE_WITHIN`] x `best`.
///
/// `curve` holds (learning rate, loss), rates ascending, infinite losses for diverged runs. Where
/// the neighbour of such a row has a finite loss, the border is where a straight line between the
/// two, on logarithmic axes, reaches the limit; where the neighbour diverged, or there is none, the
/// row ends at its last rate: how far a curve goes on before it breaks off is not guessed.
#[must_use]
pub fn usable_range(curve: &[(f64, f64)], best: f64) -> Option<(f64, f64)> {
    let limit = USABLE_WITHIN * best;
    let usable = |point: &(f64, f64)| point.1 <= limit;
    let mut widest: Option<(f64, f64)> = None;
    let mut start = 0;
    for row in curve.chunk_by(|a, b| usable(a) == usable(b)) {
        let end = start + row.len();
        if usable(&row[0]) {
            let before = start.checked_sub(1).map(|at| curve[at]);
            let low = border(curve[start], before, limit);
            let high = border(curve[end - 1], curve.get(end).copied(), limit);
            if widest.is_none_or(|range| decades((low, high)) > decades(range)) {
                widest = Some((low, high));
            }
        }
        start = end;
    }
    widest
}

/// Where the loss reaches `limit` on the way from a usable point to its neighbour.
fn border(usable: (f64, f64), neighbour: Option<(f64, f64)>, limit: f64) -> f64 {
    match neighbour {
        Some((lr, loss)) if loss.is_finite() => {
            let share = (limit / usable.1).ln() / (loss / usable.1).ln();
            usable.0 * (lr / usable.0).powf(share)
        }
        _ => usable.0,
    }
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

    fn assert_range(curve: &[(f64, f64)], best: f64, expected: (f64, f64)) {
        let (low, high) = usable_range(curve, best).unwrap_or((f64::NAN, f64::NAN));
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-3;
        assert!(
            near(low, expected.0) && near(high, expected.1),
            "{low} to {high}"
        );
    }

    const INF: f64 = f64::INFINITY;

    fn curve(losses: [f64; 6]) -> Vec<(f64, f64)> {
        [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
            .into_iter()
            .zip(losses)
            .collect()
    }

    #[test]
    fn usable_range_of_known_losses() {
        // The losses of the issue that asked for this: PyTorch, SGD, power 4. The limit is 0.1092:
        // none: 3e-3 * (1e-3 / 3e-3)^(ln(0.1092 / 0.100) / ln(0.139 / 0.100)), up to 3e-3: NaN
        // follows.
        let none = curve([0.6, 0.139, 0.100, INF, INF, INF]);
        assert_range(&none, 0.091, (2.237e-3, 3e-3));
        // norm: from just below 1e-3, up to 3e-2 * (1e-1 / 3e-2)^(ln(0.1092 / 0.107) / ln(0.111 /
        // 0.107)).
        let norm = curve([2.08, 0.106, 0.093, 0.091, 0.107, 0.111]);
        assert_range(&norm, 0.091, (9.772e-4, 5.849e-2));
    }

    #[test]
    fn usable_range_is_the_widest_unbroken_row_and_ends_where_runs_diverge() {
        assert_range(&curve([1.0, INF, 1.0, 1.0, 1.0, 1.0]), 1.0, (3e-3, 1e-1));
        assert_range(&curve([1.0, 1.0, 1.0, INF, 1.0, INF]), 1.0, (1e-4, 3e-3));
        assert_eq!(usable_range(&curve([INF; 6]), 1.0), None);
        assert_eq!(usable_range(&[], 1.0), None);
        assert!((decades((1e-3, 3e-2)) - 1.477).abs() < 1e-3);
    }

    #[test]
    fn the_limit_itself_is_usable() {
        assert_range(&[(0.1, 1.2), (1.0, 1.21)], 1.0, (0.1, 0.1));
        assert_eq!(usable_range(&[(0.1, 1.201)], 1.0), None);
    }
}
