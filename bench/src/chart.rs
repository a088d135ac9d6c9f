//! The pictures.

use plot::{Chart, Panel, Series};

use crate::op::{Impl, Op, PASTE_IN_KEPT};
use crate::record::{GradNorms, Point};
use crate::results::{groups, median_of, of};

/// Everyone who may be in a picture, in the order of colours: ours first.
const RIVALS: [&str; 7] = [
    "candle-grad-clip",
    "paste-in",
    "pytorch",
    "tensorflow",
    "optax",
    "burn",
    PASTE_IN_KEPT,
];

/// How many times the floor each rival takes: a panel an operation, a place a set.
pub(crate) fn compared(measured: &[GradNorms]) -> Chart {
    let panels = [Op::ClipGradNorm, Op::ClipAdamW, Op::ClipSgd]
        .into_iter()
        .map(Op::name)
        .filter(|op| measured.iter().any(|row| row.op == *op));
    Chart {
        title: "Median time over the floor's: 1 is the speed of memory".into(),
        panels: panels.map(|op| compared_in(op, measured)).collect(),
    }
}

fn compared_in(op: &str, measured: &[GradNorms]) -> Panel {
    let groups = groups(measured);
    let series = RIVALS.iter().enumerate().map(|(color_index, rival)| {
        let mut points = Vec::new();
        for (place, (set, dtype)) in groups.iter().enumerate() {
            let rows: Vec<&GradNorms> = of(measured, set, dtype).collect();
            let ratio = median_of(&rows, op, rival) / median_of(&rows, op, Impl::Floor.name());
            // Side by side, so that no marker hides another.
            let aside = 0.1 * (color_index as f64 - (RIVALS.len() - 1) as f64 / 2.0);
            points.push((place as f64 + aside, ratio));
            // A gap: sets are no line.
            points.push((f64::NAN, f64::NAN));
        }
        Series {
            name: (*rival).to_owned(),
            points,
            color_index,
            ..Series::default()
        }
    });
    Panel {
        x_label: "gradient set, dtype".into(),
        x_names: groups
            .iter()
            .map(|(set, dtype)| format!("{set}, {dtype}"))
            .collect(),
        y_label: format!("{op}: time / floor (ratio)"),
        y_log: true,
        series: series
            .filter(|series| series.points.iter().any(|(_, ratio)| ratio.is_finite()))
            .collect(),
        horizontal: vec![("floor".into(), 1.0)],
        ..Panel::default()
    }
}

/// Time by elements above, by tensors below.
pub(crate) fn growth(op: &str, points: &[Point]) -> Chart {
    let panel = |of: &str, x_label: &str| {
        let series = Impl::ALL.iter().enumerate().map(|(index, rival)| Series {
            name: rival.name().to_owned(),
            points: points
                .iter()
                .filter(|point| point.op == op && point.of == of && point.rival == rival.name())
                .map(|point| (point.count as f64, point.median_ms))
                .collect(),
            // The floor is black.
            color_index: if *rival == Impl::Floor { 6 } else { index },
            dashed: *rival == Impl::Floor,
            ..Series::default()
        });
        Panel {
            x_label: x_label.to_owned(),
            x_log: true,
            y_label: "median time (ms)".into(),
            y_log: true,
            series: series.collect(),
            ..Panel::default()
        }
    };
    Chart {
        title: format!("How the time of {op} grows"),
        panels: vec![
            panel("elements", "elements of one tensor"),
            panel("tensors", "tensors of 100 to 1000 elements"),
        ],
    }
}
