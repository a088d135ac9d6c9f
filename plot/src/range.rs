//! Where values lie on an axis, and which range of positions a panel shows.

use std::ops::Range;

/// Linear positions end here, and begin again at its inverse, so that widths neither overflow nor vanish.
const LARGEST: f64 = 1e300;
/// On a logarithmic axis, how many decades a value may lie outside the middle 80 % of the values
/// before it is cut off: a run that diverges would otherwise squash all others into a line.
const OUTLIER_DECADES: f64 = 3.0;

/// The position of a value on an axis, or `None` if it has none.
pub(super) fn position(value: f64, log: bool) -> Option<f64> {
    let position = match log {
        true => value.log10(),
        false if value.abs() < 1.0 / LARGEST => 0.0,
        false => value.clamp(-LARGEST, LARGEST),
    };
    (value.is_finite() && position.is_finite()).then_some(position)
}

/// A range that holds all values that have a position.
pub(super) fn spanning(values: impl IntoIterator<Item = f64>, log: bool) -> Range<f64> {
    padded(ends(&positions(values, log)), log)
}

/// The same, but without outliers if logarithmic ([`OUTLIER_DECADES`]), and with a share `headroom` of the
/// height left free at the top.
pub(super) fn without_outliers(
    values: impl IntoIterator<Item = f64>,
    log: bool,
    headroom: f64,
) -> Range<f64> {
    let sorted = positions(values, log);
    let all = ends(&sorted);
    let mut range = padded(
        if log {
            all.map(|all| trimmed(all, &sorted))
        } else {
            all
        },
        log,
    );
    range.end += headroom * (range.end - range.start);
    range
}

/// Whether a position is shown; both edges are.
pub(super) fn within(shown: &Range<f64>, position: f64) -> bool {
    position >= shown.start && position <= shown.end
}

fn positions(values: impl IntoIterator<Item = f64>, log: bool) -> Vec<f64> {
    let mut positions: Vec<f64> = values
        .into_iter()
        .filter_map(|value| position(value, log))
        .collect();
    positions.sort_by(f64::total_cmp);
    positions
}

fn ends(sorted: &[f64]) -> Option<(f64, f64)> {
    Some((*sorted.first()?, *sorted.last()?))
}

fn trimmed((low, high): (f64, f64), sorted: &[f64]) -> (f64, f64) {
    let quantile = |q: f64| sorted[((sorted.len() - 1) as f64 * q).round() as usize];
    (
        low.max(quantile(0.1) - OUTLIER_DECADES),
        high.min(quantile(0.9) + OUTLIER_DECADES),
    )
}

/// A margin around what is shown; something to show where all values are one, or none.
fn padded(shown: Option<(f64, f64)>, log: bool) -> Range<f64> {
    let Some((low, high)) = shown else {
        return 0.0..1.0;
    };
    let width = high - low;
    let largest = low.abs().max(high.abs());
    let (narrow, instead) = if log {
        (0.1, 0.2)
    } else {
        (
            largest * 1e-6,
            if largest == 0.0 { 1.0 } else { largest * 0.1 },
        )
    };
    let margin = if width <= narrow {
        instead
    } else {
        0.04 * width
    };
    low - margin..high + margin
}

#[cfg(test)]
mod tests {
    use super::super::axis::Axis;
    use super::*;

    #[test]
    fn an_exploding_run_does_not_squash_the_others() {
        let mut losses = vec![0.1; 98];
        losses.extend([1e20, 1e35]);
        let all = spanning(losses.iter().copied(), true);
        let shown = without_outliers(losses, true, 0.0);
        assert!(all.end > 35.0);
        assert!(
            shown.start < -1.0 && shown.end > -1.0 && shown.end < 3.0,
            "{shown:?}"
        );
    }

    #[test]
    fn headroom_is_a_share_of_the_height() {
        let plain = without_outliers([1.0, 3.0], false, 0.0);
        let roomy = without_outliers([1.0, 3.0], false, 0.5);
        assert!((roomy.start - plain.start).abs() < 1e-12);
        assert!((roomy.end - plain.end - 0.5 * (plain.end - plain.start)).abs() < 1e-12);
    }

    #[test]
    fn every_input_gives_a_finite_range_and_few_ticks() {
        let odd = [
            0.0,
            -0.0,
            1.0,
            -1.0,
            5e-324,
            -5e-324,
            1e-310,
            1e300,
            f64::MAX,
            f64::MIN,
            1e-5,
        ];
        let odd: Vec<f64> = odd
            .into_iter()
            .chain([f64::NAN, f64::INFINITY, f64::NEG_INFINITY])
            .collect();
        for (a, b) in odd.iter().flat_map(|a| odd.iter().map(move |b| (*a, *b))) {
            for log in [false, true] {
                let axis = Axis::new(without_outliers([a, b], log, 0.1), log, 7);
                let width = axis.shown.end - axis.shown.start;
                assert!(
                    width.is_finite() && width > 0.0,
                    "{a:e} {b:e} {log}: {axis:?}"
                );
                assert!(axis.ticks.len() <= 8, "{a:e} {b:e} {log}: {axis:?}");
            }
        }
        assert_eq!(spanning([], true), 0.0..1.0);
    }
}
