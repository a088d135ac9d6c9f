//! A page as a long run leaves it: every kind of section, with all that goes wrong in a run.

use candle_grad_clip_log::page::{
    Curve, HeatMap, Line, LineChart, Mark, Page, Panel, Section, Table,
};

/// Even noise from 0 to 1, the same in each run.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn next(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 40) as f64 / (1_u64 << 24) as f64
    }
}

pub(crate) fn page(steps: u32, rows: usize, columns: usize) -> Page {
    Page {
        title: "Weighted power loss <AdamW & \"clip\">".to_string(),
        subtitle: format!("Finished after {steps} steps in 14 min 3 s, 118 steps a second."),
        refresh: None,
        sections: vec![
            heading("Is it learning?"),
            text(
                Mark::Good,
                "The test loss fell from 2.41 to 0.083 and is still falling.",
            ),
            Section::LineChart(loss(steps)),
            heading("Is it stable?"),
            text(
                Mark::Warning,
                "3 steps were skipped: their gradients were not finite. \u{2028}</script>",
            ),
            Section::LineChart(norms(steps)),
            Section::Table(skipped()),
            heading("Which Vars learn nothing?"),
            text(
                Mark::None,
                "All Vars get a gradient.\nNone of them is exactly zero.",
            ),
            heading("Which Vars dominate the norm?"),
            Section::HeatMap(heat(rows, columns)),
            heading("Which limit would suit?"),
            Section::Table(percentiles()),
            heading("How do the rules compare?"),
            Section::LineChart(sweep()),
            Section::LineChart(compared()),
            Section::Links {
                links: vec![
                    (
                        "The run with seed 2".to_string(),
                        "seed-2/index.html".to_string(),
                    ),
                    ("No script".to_string(), "javascript:alert(1)".to_string()),
                ],
            },
        ],
    }
}

fn heading(text: &str) -> Section {
    Section::Heading {
        text: text.to_string(),
    }
}

fn text(mark: Mark, text: &str) -> Section {
    Section::Text {
        text: text.to_string(),
        mark,
    }
}

fn line(name: &str, style: usize, points: Vec<(f64, f64)>) -> Line {
    Line {
        name: name.to_string(),
        style,
        points,
        ..Line::default()
    }
}

fn curve(steps: u32, value: impl FnMut(f64) -> f64) -> Vec<(f64, f64)> {
    let mut value = value;
    let mut curve = Curve::new();
    for step in 1..=steps {
        curve.push(f64::from(step), value(f64::from(step) / f64::from(steps)));
    }
    curve.points()
}

fn loss(steps: u32) -> LineChart {
    let mut noise = Noise(1);
    let train = curve(steps, |at| {
        (0.07 + 2.3 * (-6.0 * at).exp()) * (0.6 + 0.8 * noise.next())
    });
    let mut noise = Noise(2);
    let diverged = curve(steps, |at| match at {
        ..0.4 => (0.3 + 2.0 * (-5.0 * at).exp()) * (0.6 + 0.8 * noise.next()),
        ..0.55 => (0.6 + 0.8 * noise.next()) * ((at - 0.4) * 500.0).exp(),
        ..0.57 => f64::INFINITY,
        _ => f64::NAN,
    });
    let every = f64::from(steps) / 40.0;
    let test = (1..=40).map(|i| {
        let at = f64::from(i) / 40.0;
        (
            (every * f64::from(i)).round(),
            0.08 + 2.3 * (-6.0 * at).exp(),
        )
    });
    let test = Line {
        markers: true,
        ..line("test", 1, test.collect())
    };
    LineChart {
        title: "Loss".to_string(),
        x_label: "step".to_string(),
        panels: vec![Panel {
            y_label: "loss".to_string(),
            y_log: true,
            lines: vec![
                line("train", 0, train),
                test,
                line("train without clipping", 2, diverged),
            ],
            ..Panel::default()
        }],
        ..LineChart::default()
    }
}

fn norms(steps: u32) -> LineChart {
    let norm = |seed: u64| {
        let mut noise = Noise(seed);
        move |at: f64| {
            let spike = if noise.next() > 0.997 { 40.0 } else { 1.0 };
            if (0.61..0.6103).contains(&at) {
                f64::NAN
            } else {
                spike * (0.3 + 2.0 * (-3.0 * at).exp()) * (0.5 + noise.next())
            }
        }
    };
    let (mut after, mut coef) = (norm(7), norm(7));
    let mut share = Noise(9);
    let panel = |y_label: &str, y_log, lines| Panel {
        y_label: y_label.to_string(),
        y_log,
        lines,
        ..Panel::default()
    };
    let mut above = panel(
        "global norm",
        true,
        vec![
            line("before clipping", 0, curve(steps, norm(7))),
            Line {
                dashed: true,
                ..line("after clipping", 1, curve(steps, |at| after(at).min(1.0)))
            },
        ],
    );
    above.levels = vec![("max_norm 1".to_string(), 1.0)];
    let coefs = curve(steps, |at| (1.0 / coef(at)).min(1.0));
    let shares = curve(steps, |at| {
        (0.9 * (-2.0 * at).exp() + 0.05 * share.next()).min(1.0)
    });
    LineChart {
        title: "Norm of all gradients".to_string(),
        x_label: "step".to_string(),
        panels: vec![
            above,
            panel("coefficient", false, vec![line("coefficient", 3, coefs)]),
            panel(
                "clipped share",
                false,
                vec![line("clipped share of the last 100", 4, shares)],
            ),
        ],
        ..LineChart::default()
    }
}

fn table(title: &str, columns: &[&str], rows: &[&[&str]]) -> Table {
    let own = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
    Table {
        title: title.to_string(),
        columns: own(columns),
        rows: rows.iter().map(|row| own(row)).collect(),
    }
}

fn skipped() -> Table {
    table(
        "Skipped steps",
        &["step", "loss", "norm", "reason"],
        &[
            &[
                "9",
                "0.31",
                "inf",
                "non-finite gradients in encoder.layers.11.attention.query.weight",
            ],
            &["10,300", "NaN", "NaN", "non-finite loss <b>"],
            &["1,204", "0.29", "1.2e39", "norm above the largest number"],
        ],
    )
}

fn percentiles() -> Table {
    table(
        "Percentiles of the norm, and what each would clip",
        &["percentile", "norm", "would clip", "mean coefficient"],
        &[
            &["50", "0.482", "50 %", "0.71"],
            &["90", "1.93", "10 %", "0.95"],
            &["95", "2.41", "5 %", "0.97"],
            &["99", "14.7", "1 %", "0.994"],
            &["99.9", "81.2", "0.1 %", "0.9991"],
        ],
    )
}

fn heat(rows: usize, columns: usize) -> HeatMap {
    let mut noise = Noise(3);
    let parts = [
        "attention.query",
        "attention.key",
        "attention.value",
        "mlp.up",
        "mlp.down",
    ];
    let row = |row: usize| {
        let kind = if row.is_multiple_of(2) {
            "weight"
        } else {
            "bias"
        };
        let name = format!("encoder.layers.{}.{}.{kind}", row / 10, parts[row / 2 % 5]);
        let size = 10_f64.powf(-3.0 + 3.0 * noise.next());
        let cells = (0..columns).map(|column| match (row, column) {
            (5, column) if column > columns / 2 => None,
            (8, _) => Some(0.0),
            (12, column) if column % 50 == 7 => Some(f64::INFINITY),
            (_, column) if column == columns * 6 / 10 => Some(f64::NAN),
            _ => Some(size * (0.3 + noise.next()) * (-2.0 * column as f64 / columns as f64).exp()),
        });
        (name, cells.collect())
    };
    HeatMap {
        title: "Gradient norm of each Var".to_string(),
        x_label: "step".to_string(),
        value_label: "norm".to_string(),
        columns: (0..columns)
            .map(|column| (column * 250).to_string())
            .collect(),
        rows: (0..rows).map(row).collect(),
    }
}

/// Medians with their seeds behind them, named levels, diverged runs: all on logarithmic axes.
fn sweep() -> LineChart {
    let rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1];
    let mut lines = Vec::new();
    for (style, arm) in ["none", "global norm 1", "value 0.1", "AGC 0.02"]
        .iter()
        .enumerate()
    {
        let best = -2.0 - 0.4 * style as f64;
        let loss = |seed: f64, rate: f64| {
            let away = rate.log10() - best;
            0.08 + 0.1 * away * away * (1.0 + 0.15 * seed) + 0.02 * style as f64
        };
        for seed in [-1.0, 0.0, 1.0] {
            let points = rates.iter().map(|rate| (*rate, loss(seed, *rate)));
            lines.push(Line {
                faint: true,
                ..line(arm, style, points.collect())
            });
        }
        let is_lost = |rate: f64| rate > 0.02 && style < 2;
        let points = rates.iter().map(|rate| {
            let y = if is_lost(*rate) {
                f64::NAN
            } else {
                loss(0.0, *rate)
            };
            (*rate, y)
        });
        lines.push(Line {
            markers: true,
            ..line(arm, style, points.collect())
        });
    }
    LineChart {
        title: "Best test loss by learning rate".to_string(),
        x_label: "learning rate".to_string(),
        x_log: true,
        panels: vec![Panel {
            y_label: "best test loss".to_string(),
            y_log: true,
            lines,
            levels: vec![
                ("constant".to_string(), 0.9),
                ("persistence".to_string(), 0.4),
            ],
            ..Panel::default()
        }],
        ..LineChart::default()
    }
}

/// Marks beside each other over names in place of numbers.
fn compared() -> LineChart {
    let rivals = ["candle-grad-clip", "pytorch", "tensorflow", "optax", "burn"];
    let lines = rivals.iter().enumerate().map(|(style, rival)| {
        let aside = 0.1 * (style as f64 - 2.0);
        let points = (0..4).flat_map(|place| {
            let x = f64::from(place) + aside;
            [(x, 1.1 + style as f64 * 0.7), (f64::NAN, f64::NAN)]
        });
        Line {
            markers: true,
            ..line(rival, style, points.collect())
        }
    });
    LineChart {
        title: "Median time over the floor's".to_string(),
        x_label: "gradient set, dtype".to_string(),
        x_names: [
            "GPT-2 small, f32",
            "GPT-2 small, bf16",
            "ResNet-50, f32",
            "many small, f32",
        ]
        .map(str::to_string)
        .to_vec(),
        panels: vec![Panel {
            title: "clip_grad_norm".to_string(),
            y_label: "time / floor (ratio)".to_string(),
            y_log: true,
            lines: lines.collect(),
            levels: vec![("floor".to_string(), 1.0)],
        }],
        ..LineChart::default()
    }
}
