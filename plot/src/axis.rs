//! One axis: where its ticks are and what they say. Which range it shows: see [`super::range`].

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

/// A linear or base-10 logarithmic axis.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Axis {
    log: bool,
    /// What is shown, in positions (logarithms if `log`).
    pub(super) shown: Range<f64>,
    /// Positions of labelled ticks.
    pub(super) ticks: Vec<f64>,
    /// Positions of grid lines without a label.
    minor: Vec<f64>,
    scientific: bool,
    decimals: usize,
    /// What the ticks say, if they are not numbers.
    names: Vec<String>,
}

impl Axis {
    /// An axis that shows a range of positions; `max_ticks` is how many labels there is room for.
    pub(super) fn new(range: Range<f64>, log: bool, max_ticks: usize) -> Self {
        if log {
            Self::logarithmic(range, max_ticks)
        } else {
            Self::linear(range, max_ticks)
        }
    }

    /// An axis with these names at 0, 1, 2, ..., each in the middle of a place of its own.
    pub(super) fn named(names: &[String]) -> Self {
        let places = names.len() as f64;
        Self {
            log: false,
            shown: -0.5..places - 0.5,
            ticks: (0..names.len()).map(|place| place as f64).collect(),
            minor: Vec::new(),
            scientific: false,
            decimals: 0,
            names: names.to_vec(),
        }
    }

    fn linear(range: Range<f64>, max_ticks: usize) -> Self {
        let step = round_step((range.end - range.start) / max_ticks.max(1) as f64);
        let ticks = multiples(&range, step);
        let scientific = step < 1e-3 || range.end.abs().max(range.start.abs()) >= 1e6;
        let decimals = if scientific {
            0
        } else {
            (-step.log10().floor()).max(0.0) as usize
        };
        Self {
            log: false,
            shown: range,
            ticks,
            minor: Vec::new(),
            scientific,
            decimals,
            names: Vec::new(),
        }
    }

    fn logarithmic(range: Range<f64>, max_ticks: usize) -> Self {
        let decades = range.end - range.start;
        let stride = (decades / max_ticks.max(1) as f64).ceil().max(1.0);
        let room = max_ticks as f64 / decades;
        let (labelled, unlabelled): (&[f64], &[f64]) = match (stride > 1.0, room) {
            (true, _) => (&[1.0], &[]),
            (_, room) if room >= 8.0 => (&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0], &[7.0, 9.0]),
            (_, room) if room >= 3.5 => (&[1.0, 2.0, 5.0], &[3.0, 4.0, 6.0, 7.0, 8.0, 9.0]),
            _ => (&[1.0], &[2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]),
        };
        let ticks = decade_positions(&range, labelled, stride);
        let minor = decade_positions(&range, unlabelled, 1.0);
        let scientific = range.start < -3.0 || range.end > 4.0;
        Self {
            log: true,
            shown: range,
            ticks,
            minor,
            scientific,
            decimals: 0,
            names: Vec::new(),
        }
    }

    /// The label of a tick at a position.
    pub(super) fn label(&self, position: f64) -> String {
        if let Some(name) = self.names.get(position as usize) {
            return name.clone();
        }
        if self.log {
            let exponent = (position + 1e-9).floor();
            let digit = 10f64.powf(position - exponent).round();
            if self.scientific {
                format!("{digit}e{exponent}")
            } else {
                format!("{digit:.0}e{exponent:.0}")
                    .parse::<f64>()
                    .unwrap_or(f64::NAN)
                    .to_string()
            }
        } else if self.scientific {
            // Rounded, since ticks are multiples of a step that binary fractions do not hold exactly.
            let rounded = format!("{position:.3e}").parse::<f64>().unwrap_or(position);
            if rounded == 0.0 {
                "0".into()
            } else {
                format!("{rounded:e}")
            }
        } else {
            let label = format!("{position:.*}", self.decimals);
            label
                .strip_prefix('-')
                .filter(|rest| rest.parse() == Ok(0.0))
                .map_or(label.clone(), String::from)
        }
    }
}

/// plotters sees positions, so its own logarithms and ticks stay out of the way.
impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, position: &f64, (first, last): (i32, i32)) -> i32 {
        let share = (position - self.shown.start) / (self.shown.end - self.shown.start);
        (f64::from(first) + share * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            self.minor.clone()
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

/// 1, 2 or 5 times a power of ten, at least `smallest`.
fn round_step(smallest: f64) -> f64 {
    let power = 10f64.powf(smallest.log10().floor());
    [1.0, 2.0, 5.0]
        .into_iter()
        .map(|digit| digit * power)
        .find(|step| *step >= smallest)
        .unwrap_or(10.0 * power)
}

fn multiples(range: &Range<f64>, step: f64) -> Vec<f64> {
    let first = (range.start / step).ceil();
    let count = ((range.end / step).floor() - first).clamp(0.0, 100.0) as usize;
    (0..=count)
        .map(|i| (first + i as f64) * step)
        .filter(|tick| *tick >= range.start && *tick <= range.end)
        .collect()
}

fn decade_positions(range: &Range<f64>, digits: &[f64], stride: f64) -> Vec<f64> {
    let first = (range.start / stride).floor() as i64;
    let last = (range.end / stride).ceil() as i64;
    (first..=last)
        .flat_map(|decade| {
            digits
                .iter()
                .map(move |digit| decade as f64 * stride + digit.log10())
        })
        .filter(|at| *at >= range.start && *at <= range.end)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::range::spanning;
    use super::*;

    fn labels(values: &[f64], log: bool, max_ticks: usize) -> Vec<String> {
        let axis = Axis::new(spanning(values.iter().copied(), log), log, max_ticks);
        axis.ticks.iter().map(|tick| axis.label(*tick)).collect()
    }

    #[test]
    fn decades_of_a_learning_rate_are_labelled_as_powers() {
        assert_eq!(
            labels(&[1e-4, 1e-1], true, 8),
            ["1e-4", "1e-3", "1e-2", "1e-1"]
        );
    }

    #[test]
    fn one_decade_gets_ticks_between_and_plain_numbers() {
        assert_eq!(
            labels(&[0.09, 2.2], true, 7),
            ["0.1", "0.2", "0.5", "1", "2"]
        );
    }

    #[test]
    fn many_decades_do_not_crowd() {
        let found = labels(&[1e-30, 1e10], true, 7);
        assert!((3..=7).contains(&found.len()), "{found:?}");
        assert!(found.contains(&"1e0".to_owned()), "{found:?}");
    }

    #[test]
    fn linear_ticks_are_round() {
        let steps = ["0", "100", "200", "300", "400", "500"];
        assert_eq!(labels(&[0.0, 500.0], false, 6), steps);
        assert_eq!(
            labels(&[-0.2, 0.2], false, 5),
            ["-0.2", "-0.1", "0.0", "0.1", "0.2"]
        );
        assert_eq!(labels(&[0.0, 3e6], false, 4), ["0", "1e6", "2e6", "3e6"]);
    }
}
