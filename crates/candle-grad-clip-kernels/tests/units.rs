//! Rows and columns of matrices, against the same done to each alone.
#![allow(missing_docs)]

use candle_grad_clip_kernels::{
    AdamW, BLOCK, Edit, Element, NormType, Stats, UnitEdit, Units, Update, edit, edit_into,
    measure, measure_units, update,
};
use half::{bf16, f16};

/// Shapes within a block, around it, and above; rows of one element, and one row.
const SHAPES: [(usize, usize); 9] = [
    (0, 3),
    (1, 1),
    (1, 37),
    (37, 1),
    (5, 17),
    (300, 9),
    (3, BLOCK / 2),
    (2500, 33),
    (2, BLOCK + 5),
];

fn values(n: usize) -> Vec<f64> {
    let value =
        |i: usize| (i as f64 * 12.9898).sin() * [1e-3, 0.01, 0.1, 1.0, 10.0, 100.0, 1e3][i % 7];
    (0..n).map(value).collect()
}

/// The indices of a unit's elements.
fn members(units: Units, unit: usize, elements: usize) -> Vec<usize> {
    match units {
        Units::Rows(length) => (unit * length..(unit + 1) * length).collect(),
        Units::Columns(columns) => (unit..elements).step_by(columns).collect(),
    }
}

fn cases() -> impl Iterator<Item = (usize, Units)> {
    let both = |(rows, columns): (usize, usize)| {
        let n = rows * columns;
        [(n, Units::Rows(columns)), (n, Units::Columns(columns))]
    };
    let small = |(rows, columns): &(usize, usize)| !cfg!(miri) || rows * columns < 100;
    SHAPES.into_iter().filter(small).flat_map(both)
}

fn measures<E: Element + PartialEq>(round: impl Fn(f64) -> E) {
    for (n, units) in cases() {
        let mut elements: Vec<E> = values(n).into_iter().map(&round).collect();
        if n > 40 {
            elements[n / 2] = round(f64::NAN);
            elements[n / 3] = round(f64::INFINITY);
            for i in members(units, units.count(n) - 1, n) {
                elements[i] = round(0.0);
            }
        }
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::P(1.5)] {
            let mut stats = vec![Stats::ZERO; units.count(n)];
            measure_units(&elements, units, norm_type, &mut stats);
            let whole = stats
                .iter()
                .fold(Stats::ZERO, |sum, unit| sum.merge(*unit, norm_type));
            let (whole, right) = (whole.power, measure(&elements, norm_type).power);
            let norms = [whole, right].map(|power| power.root(norm_type).value());
            assert!(
                (norms[0] - norms[1]).abs() <= 1e-12 * norms[1],
                "{n} {units:?} {norm_type}"
            );
            for (unit, stats) in stats.iter().enumerate() {
                let members = members(units, unit, n);
                let alone: Vec<E> = members.iter().map(|&i| elements[i]).collect();
                let right = measure(&alone, norm_type);
                assert_eq!((stats.nan, stats.infinite), (right.nan, right.infinite));
                let norm = |stats: Stats| stats.power.root(norm_type).value();
                let difference = (norm(*stats) - norm(right)).abs();
                assert!(difference <= 1e-13 * norm(right), "{n} {units:?} {unit}");
            }
        }
    }
}

#[test]
fn each_unit_measures_as_it_does_alone() {
    measures(|x| x);
    measures(|x| x as f32);
    measures(f16::from_f64);
    measures(bf16::from_f64);
}

#[test]
fn units_keep_the_range_of_f64() {
    let matrix = [3e200, 3e-200, 4e200, 4e-200];
    let mut stats = [Stats::ZERO; 2];
    measure_units(&matrix, Units::Columns(2), NormType::L2, &mut stats);
    for (stats, right) in stats.into_iter().zip([5e200, 5e-200]) {
        let norm = stats.power.root(NormType::L2).value();
        assert!((norm / right - 1.0).abs() < 1e-15);
    }
}

fn edits<E: Element + PartialEq + std::fmt::Debug>(round: impl Fn(f64) -> E) {
    for (n, units) in cases() {
        let mut elements: Vec<E> = values(n).into_iter().map(&round).collect();
        if n > 40 {
            elements[n / 2] = round(f64::INFINITY);
        }
        let coefs: Vec<f64> = (0..units.count(n))
            .map(|unit| [1.0, 0.3, 1e-40, 0.0][unit % 4])
            .collect();
        for zero_non_finite in [true, n <= 40] {
            let mut right = elements.clone();
            for (unit, clip_coef) in coefs.iter().copied().enumerate() {
                for i in members(units, unit, n) {
                    let scale = Edit::Scale {
                        clip_coef,
                        zero_non_finite,
                    };
                    edit(&mut right[i..=i], scale);
                }
            }
            let of_units = UnitEdit {
                units,
                coefs: &coefs,
                zero_non_finite,
            };
            let mut target = elements.clone();
            edit_into(&elements, &mut target, of_units);
            let mut in_place = elements.clone();
            edit(&mut in_place, of_units);
            let same = |got: &[E]| {
                let mut pairs = got.iter().zip(&right);
                pairs.all(|(x, y)| x == y || !zero_non_finite && x.to_f64().is_nan())
            };
            assert!(same(&target) && same(&in_place), "{n} {units:?}");
        }
    }
}

#[test]
fn each_unit_is_edited_as_it_is_alone() {
    edits(|x| x);
    edits(|x| x as f32);
    edits(f16::from_f64);
    edits(bf16::from_f64);
}

#[test]
fn a_step_takes_the_coefficients_of_units() {
    let rule = AdamW {
        lr: 0.1,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        step: 1,
    };
    for (n, units) in cases() {
        let grads: Vec<f32> = values(n).into_iter().map(|x| x as f32).collect();
        let coefs: Vec<f64> = (0..units.count(n)).map(|i| 1.0 / (1 + i) as f64).collect();
        let of_units = UnitEdit {
            units,
            coefs: &coefs,
            zero_non_finite: false,
        };
        let step = |grads: &[f32], edited: bool| {
            let (mut params, mut m, mut v) = (vec![1f32; n], vec![0f32; n], vec![0f32; n]);
            let whole = Update {
                params: &mut params,
                grads,
                moments: [&mut m, &mut v, &mut []],
                master: &mut [],
            };
            if edited {
                update(whole, of_units, &rule);
            } else {
                update(whole, Edit::NOTHING, &rule);
            }
            params
        };
        let mut clipped = grads.clone();
        edit(&mut clipped, of_units);
        assert_eq!(step(&grads, true), step(&clipped, false), "{n} {units:?}");
    }
}
