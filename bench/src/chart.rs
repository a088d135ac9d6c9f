//! The page of how cost grows.

use candle_grad_clip_log::page::{Line, LineChart, Page, Panel, Section};

use crate::op::{Impl, Op};
use crate::record::Point;

/// Time by elements and by tensors, for each operation.
pub(crate) fn growth(ops: &[Op], points: &[Point]) -> Page {
    let mut sections = Vec::new();
    for op in ops {
        let text = format!("How the time of {} grows", op.name());
        sections.push(Section::Heading { text });
        for (of, x_label) in [
            ("elements", "elements of one tensor"),
            ("tensors", "tensors of 100 to 1000 elements"),
        ] {
            sections.push(Section::LineChart(chart(op.name(), of, x_label, points)));
        }
    }
    Page {
        title: "How cost grows".to_owned(),
        sections,
        ..Page::default()
    }
}

fn chart(op: &str, of: &str, x_label: &str, points: &[Point]) -> LineChart {
    let line = |(style, rival): (usize, &Impl)| Line {
        name: rival.name().to_owned(),
        points: points
            .iter()
            .filter(|point| point.op == op && point.of == of && point.rival == rival.name())
            .map(|point| (point.count as f64, point.median_ms))
            .collect(),
        markers: true,
        dashed: *rival == Impl::Floor,
        style,
        ..Line::default()
    };
    LineChart {
        title: format!("{op}, by {of}"),
        x_label: x_label.to_owned(),
        x_log: true,
        panels: vec![Panel {
            y_label: "median time (ms)".to_owned(),
            y_log: true,
            lines: Impl::ALL.iter().enumerate().map(line).collect(),
            ..Panel::default()
        }],
        ..LineChart::default()
    }
}
