//! Which range an axis shows, and its ticks. plotters sees positions: logarithms, if the axis is
//! logarithmic.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;

/// Linear positions end here, so that widths do not overflow.
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

/// The positions that show all values, or if `trims` and logarithmic all but outliers, with a
/// margin.
pub(super) fn shown(values: impl Iterator<Item = f64>, log: bool, trims: bool) -> Range<f64> {
    let mut sorted: Vec<f64> = values.filter_map(|value| position(value, log)).collect();
    sorted.sort_by(f64::total_cmp);
    let (Some(&(mut low)), Some(&(mut high))) = (sorted.first(), sorted.last()) else {
        return 0.0..1.0;
    };
    if log && trims {
        let quantile = |q: f64| sorted[((sorted.len() - 1) as f64 * q).round() as usize];
        low = low.max(quantile(0.1) - OUTLIER_DECADES);
        high = high.min(quantile(0.9) + OUTLIER_DECADES);
    }
    let largest = low.abs().max(high.abs());
    let (narrow, instead) = match (log, largest > 0.0) {
        (true, _) => (0.1, 0.2),
        (false, true) => (largest * 1e-6, largest * 0.1),
        (false, false) => (0.0, 1.0),
    };
    let width = high - low;
    let margin = if width <= narrow {
        instead
    } else {
        0.04 * width
    };
    low - margin..high + margin
}

/// A range of positions, with its ticks.
#[derive(Clone)]
pub(super) struct Axis {
    log: bool,
    pub(super) shown: Range<f64>,
    ticks: Vec<f64>,
    light: Vec<f64>,
    /// What the ticks say, if they are not numbers.
    names: Vec<String>,
}

impl Axis {
    /// At most `room` labels.
    pub(super) fn new(shown: Range<f64>, log: bool, room: usize) -> Self {
        let (mut ticks, mut light) = (Vec::new(), Vec::new());
        if log {
            let per_decade = room as f64 / (shown.end - shown.start);
            let labelled: &[i32] = match per_decade {
                8.0.. => &[1, 2, 3, 4, 5, 6, 8],
                3.5.. => &[1, 2, 5],
                _ => &[1],
            };
            let stride = (1.0 / per_decade).ceil().max(1.0);
            let first = (shown.start / stride).floor() * stride;
            let decades = (0..).map(|i| first + f64::from(i) * stride);
            for decade in decades.take_while(|decade| *decade <= shown.end) {
                for digit in 1..10 {
                    let at = decade + f64::from(digit).log10();
                    if labelled.contains(&digit) && shown.contains(&at) {
                        ticks.push(at);
                    } else if stride == 1.0 && shown.contains(&at) {
                        light.push(at);
                    }
                }
            }
        } else {
            ticks = RangedCoordf64::from(shown.clone()).key_points(room);
        }
        Self {
            log,
            shown,
            ticks,
            light,
            names: Vec::new(),
        }
    }

    /// An axis with these names at 0, 1, 2, ..., each in the middle of its own place.
    pub(super) fn named(names: &[String]) -> Self {
        let places = names.len().max(1) as f64;
        Self {
            log: false,
            shown: -0.5..places - 0.5,
            ticks: (0..names.len()).map(|place| place as f64).collect(),
            light: Vec::new(),
            names: names.to_vec(),
        }
    }

    pub(super) fn labels(&self) -> impl Iterator<Item = String> {
        self.ticks.iter().map(|tick| self.label(*tick))
    }

    /// The label of a tick at a position.
    fn label(&self, position: f64) -> String {
        if let Some(name) = self.names.get(position.round() as usize) {
            return name.clone();
        }
        // Rounded, as binary fractions and logarithms hold few ticks exactly.
        let text = if self.log {
            format!("{:.0e}", 10f64.powf(position))
        } else {
            format!("{position:.3e}")
        };
        let value: f64 = text.parse().unwrap_or(position);
        let size = self.shown.start.abs().max(self.shown.end.abs());
        let is_plain = if self.log { size < 4.5 } else { size < 1e6 };
        if value == 0.0 || (is_plain && value.abs() >= 1e-5) {
            value.to_string()
        } else if self.log && self.shown.end > 300.0 {
            format!("1e{position:.0}")
        } else {
            format!("{value:e}")
        }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, position: &f64, limit: (i32, i32)) -> i32 {
        RangedCoordf64::from(self.shown.clone()).map(position, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            self.light.clone()
        } else {
            self.ticks.clone()
        }
    }

    fn range(&self) -> Range<f64> {
        self.shown.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(position: &f64) -> String {
        position.to_string()
    }

    fn format_ext(&self, position: &f64) -> String {
        self.label(*position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(values: &[f64], log: bool, room: usize) -> Vec<String> {
        let axis = Axis::new(shown(values.iter().copied(), log, false), log, room);
        axis.labels().collect()
    }

    #[test]
    fn ticks_are_round_and_few() {
        let rates = labels(&[1e-5, 1e-1], true, 8);
        assert_eq!(rates, ["1e-5", "1e-4", "1e-3", "1e-2", "1e-1"]);
        let losses = labels(&[0.09, 2.2], true, 7);
        assert_eq!(losses, ["0.1", "0.2", "0.5", "1", "2"]);
        assert_eq!(labels(&[0.0, 500.0], false, 6)[1..3], ["100", "200"]);
        let many = labels(&[1e-30, 1e10], true, 7);
        assert!((3..=8).contains(&many.len()), "{many:?}");
    }

    #[test]
    fn an_exploding_run_does_not_squash_the_others() {
        let mut losses = vec![0.1; 98];
        losses.extend([1e20, 1e35]);
        assert!(shown(losses.iter().copied(), true, false).end > 35.0);
        assert!((-1.0..3.0).contains(&shown(losses.into_iter(), true, true).end));
    }
}
