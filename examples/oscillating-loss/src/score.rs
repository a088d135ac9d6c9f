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
