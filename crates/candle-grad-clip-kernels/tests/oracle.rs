//! Every kernel against a naive f64 oracle: all lengths and offsets, all special values.
#![allow(missing_docs, clippy::unwrap_used)]

use candle_grad_clip_kernels::{
    BLOCK, Edit, Element, NormType, Stats, edit, edit_into, measure, measure_clamped,
};
use half::{bf16, f16};
use proptest::prelude::*;

const NORMS: [NormType; 7] = [
    NormType::L1,
    NormType::L2,
    NormType::Inf,
    NormType::P(0.5),
    NormType::P(1.5),
    NormType::P(3.0),
    NormType::P(4.0),
];

/// Norm of the finite values: scaled by the largest, with a compensated (Neumaier) sum.
fn oracle(values: impl Iterator<Item = f64> + Clone, norm_type: NormType) -> f64 {
    let finite = values.map(f64::abs).filter(|x| x.is_finite());
    let largest = finite.clone().fold(0.0, f64::max);
    if largest == 0.0 || norm_type == NormType::Inf {
        return largest;
    }
    let (mut sum, mut lost) = (0.0f64, 0.0);
    for term in finite.map(|x| (x / largest).powf(norm_type.p())) {
        let next = sum + term;
        lost += if sum >= term {
            (sum - next) + term
        } else {
            (term - next) + sum
        };
        sum = next;
    }
    largest * (sum + lost).powf(norm_type.p().recip())
}

fn norm(stats: Stats, norm_type: NormType) -> f64 {
    stats.power.root(norm_type).value()
}

fn assert_close(ours: f64, right: f64, what: &str) {
    let difference = (ours - right).abs();
    // Below the normal numbers: two roundings.
    let ok = ours == right || difference <= 1e-12 * right.abs() + 1e-323;
    assert!(ok, "{what}: {ours:e} is not {right:e}");
}

fn check<E: Element>(values: &[E], what: &str) {
    let wide = values.iter().map(|x| x.to_f64());
    let nan = wide.clone().filter(|x| x.is_nan()).count() as u64;
    let infinite = wide.clone().filter(|x| x.is_infinite()).count() as u64;
    for norm_type in NORMS {
        let stats = measure(values, norm_type);
        assert_eq!(
            (stats.nan, stats.infinite),
            (nan, infinite),
            "{what} {norm_type}"
        );
        assert_close(
            norm(stats, norm_type),
            oracle(wide.clone(), norm_type),
            what,
        );
        let clamped = measure_clamped(values, norm_type, 0.75);
        let right = oracle(wide.clone().map(|x| x.clamp(-0.75, 0.75)), norm_type);
        let above = wide.clone().filter(|x| x.abs() > 0.75).count() as u64;
        assert_eq!(clamped.before, stats, "{what} {norm_type}");
        assert_eq!(
            (
                clamped.after.nan,
                clamped.after.infinite,
                clamped.num_clipped
            ),
            (nan, 0, above),
            "{what} {norm_type} clamped"
        );
        assert_close(norm(clamped.after, norm_type), right, what);
    }
}

/// The bound that is counted with is the one that is written.
#[test]
fn a_clamped_half_is_not_clamped_again() {
    for x in [1.003_906_25 + 2f64.powi(-22), 0.1, 0.3, 0.7, 1e-9] {
        let mut values = [bf16::from_f32(1.007_812_5), bf16::from_f32(-2.0)];
        edit(
            &mut values,
            Edit::Clamp {
                clip_value: x,
                clip_coef: 1.0,
                zero_non_finite: false,
            },
        );
        assert_eq!(
            measure_clamped(&values, NormType::L2, x).num_clipped,
            0,
            "bf16 {x}"
        );
        let mut values = [f16::from_f32(1.001), f16::from_f32(-2.0)];
        edit(
            &mut values,
            Edit::Clamp {
                clip_value: x,
                clip_coef: 1.0,
                zero_non_finite: false,
            },
        );
        assert_eq!(
            measure_clamped(&values, NormType::L2, x).num_clipped,
            0,
            "f16 {x}"
        );
    }
}

/// Deterministic values in -1..1 without a dependency: a linear congruential generator.
fn noise(n: usize) -> Vec<f64> {
    let mut state = 12345u64;
    (0..n)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

fn sweep<E: Element>(from: impl Fn(f64) -> E) {
    let values: Vec<E> = noise(600).into_iter().map(&from).collect();
    for length in (0..=515).filter(|n| !cfg!(miri) || n % 37 == 0) {
        let offset = length % 17;
        check(
            &values[offset..offset + length],
            &format!("length {length} offset {offset}"),
        );
    }
    let specials = [
        0.0,
        -0.0,
        1.0,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::MAX,
        f64::MIN_POSITIVE,
        5e-324,
        1e-45,
        1e30,
        -1e-30,
        1e200,
        1e-200,
        65504.0,
        6e-8,
    ];
    for (i, &special) in specials.iter().enumerate() {
        for length in [1, 2, 15, 16, 17, 33, 100] {
            for position in [0, length / 2, length - 1] {
                for fill in [0.0, 0.5, special] {
                    let mut values = vec![from(fill); length];
                    values[position] = from(special);
                    check(
                        &values,
                        &format!("special {i} at {position} of {length}, rest {fill}"),
                    );
                }
            }
        }
    }
}

#[test]
fn sweep_f32() {
    sweep(|x| x as f32);
}
#[test]
fn sweep_f64() {
    sweep(|x| x);
}
#[test]
fn sweep_f16() {
    sweep(f16::from_f64);
}
#[test]
fn sweep_bf16() {
    sweep(bf16::from_f64);
}

/// What an edit should give, in the plainest words.
fn edited(x: f64, edit: Edit) -> f64 {
    match edit {
        Edit::Scale {
            zero_non_finite: true,
            ..
        }
        | Edit::Clamp {
            zero_non_finite: true,
            ..
        } if !x.is_finite() => 0.0,
        Edit::Scale { clip_coef, .. } => x * clip_coef,
        Edit::Clamp { clip_value, .. } if x.is_nan() => x + clip_value,
        Edit::Clamp {
            clip_value,
            clip_coef,
            ..
        } => x.clamp(-clip_value, clip_value) * clip_coef,
    }
}

fn check_edits<E: Element + std::fmt::Debug>(from: impl Fn(f64) -> E, tolerance: f64, tiny: f64) {
    let mut values: Vec<E> = noise(515).into_iter().map(&from).collect();
    values.extend(
        [
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            0.0,
            -0.0,
            6e4,
            6e-5,
        ]
        .map(&from),
    );
    for zero_non_finite in [false, true] {
        let scales = [0.0, 1e-60, 1e-38, 1e-8, 0.3, 1.0].map(|clip_coef| Edit::Scale {
            clip_coef,
            zero_non_finite,
        });
        let clamp = |(clip_value, clip_coef)| Edit::Clamp {
            clip_value,
            clip_coef,
            zero_non_finite,
        };
        let bounds = [0.0, 0.1, 0.5, 1e9];
        let clamps = bounds
            .iter()
            .flat_map(|x| [1.0, 0.25, 1e-39].map(|y| clamp((*x, y))));
        for what in scales.into_iter().chain(clamps) {
            for length in (0..40).chain([255, 256, 257, values.len()]) {
                let source = &values[values.len() - length..];
                let mut in_place = source.to_vec();
                edit(&mut in_place, what);
                let mut copied = vec![from(7.0); length];
                edit_into(source, &mut copied, what);
                for ((x, y), z) in source.iter().zip(&in_place).zip(&copied) {
                    let right = from(edited(x.to_f64(), what)).to_f64();
                    let (y, z) = (y.to_f64(), z.to_f64());
                    assert!(y.to_bits() == z.to_bits() || y.is_nan() && z.is_nan());
                    let same = y.is_nan() && right.is_nan() || y == right;
                    let close = (y - right).abs() <= tolerance * right.abs() + tiny;
                    assert!(same || close, "{what:?} of {x:?}: {y:e}, not {right:e}");
                }
            }
        }
    }
}

#[test]
fn edits_equal_the_plain_words() {
    check_edits(|x| x as f32, 2e-7, 1e-44);
    check_edits(|x| x, 0.0, 0.0);
    check_edits(f16::from_f64, 1e-3, 6e-8);
    check_edits(bf16::from_f64, 8e-3, 1e-40);
}

/// Powers of two only change exponents.
#[test]
fn an_edit_of_scaled_values_is_the_edit_of_the_values_to_the_bit() {
    let values: Vec<f32> = noise(515).into_iter().map(|x| x as f32).collect();
    let scale = 65536.0;
    for what in [
        Edit::NOTHING,
        Edit::Scale {
            clip_coef: 0.3,
            zero_non_finite: false,
        },
        Edit::Clamp {
            clip_value: 0.4,
            clip_coef: 0.3,
            zero_non_finite: true,
        },
    ] {
        let mut plain = values.clone();
        edit(&mut plain, what);
        let mut scaled: Vec<f32> = values.iter().map(|x| x * scale).collect();
        edit(&mut scaled, what.unscaling(scale.into()));
        assert_eq!(scaled, plain, "{what:?}");
        let halves: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
        let mut plain = halves.clone();
        edit(&mut plain, what);
        let mut scaled: Vec<bf16> = halves
            .iter()
            .map(|x| bf16::from_f32(x.to_f32() * scale))
            .collect();
        edit(&mut scaled, what.unscaling(scale.into()));
        assert_eq!(scaled, plain, "{what:?} in bf16");
    }
}

#[test]
fn a_half_is_widened_before_it_is_scaled() {
    let mut values = [f16::from_f32(60000.0)];
    edit(
        &mut values,
        Edit::Scale {
            clip_coef: 1e-8,
            zero_non_finite: false,
        },
    );
    assert!((values[0].to_f32() - 6e-4).abs() < 1e-6);
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    let values: Vec<f32> = noise(3 * BLOCK + 77)
        .into_iter()
        .map(|x| x as f32)
        .collect();
    let of = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| NORMS.map(|norm_type| measure(&values, norm_type)))
    };
    let one = of(1);
    for threads in [2, 3, 8] {
        assert_eq!(one, of(threads), "{threads} threads");
    }
    for (stats, norm_type) in one.into_iter().zip(NORMS) {
        let right = oracle(values.iter().map(|&x| x.into()), norm_type);
        assert_close(norm(stats, norm_type), right, "three blocks");
    }
}

#[test]
fn a_norm_past_f64_still_has_a_coefficient() {
    let stats = measure(&[f64::MAX; 4], NormType::L2);
    let norm = stats.power.root(NormType::L2);
    assert!(norm.value().is_infinite());
    // The norm is 2 f64::MAX.
    assert!((norm.clip_coef(f64::MAX, 1e-6) - 0.5).abs() < 1e-15);
    assert!((norm.scaled(0.25) / f64::MAX - 0.5).abs() < 1e-15);
}

#[test]
#[should_panic(expected = "differ in length")]
fn edit_into_refuses_another_length() {
    edit_into(
        &[1f32; 2],
        &mut [0.0; 3],
        Edit::Scale {
            clip_coef: 1.0,
            zero_non_finite: false,
        },
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

    #[test]
    fn merging_parts_equals_measuring_the_whole(
        values in prop::collection::vec(-300i32..300, 0..60),
        cut in 0usize..60,
    ) {
        let values: Vec<f64> = values.iter().map(|&e| 10f64.powi(e)).collect();
        let cut = cut.min(values.len());
        for norm_type in NORMS {
            let (a, b) = values.split_at(cut);
            let merged = measure(a, norm_type).merge(measure(b, norm_type), norm_type);
            let whole = oracle(values.iter().copied(), norm_type);
            let ours = norm(merged, norm_type);
            prop_assert!(ours == whole || (ours - whole).abs() <= 1e-12 * whole, "{ours:e} {whole:e}");
        }
    }
}
