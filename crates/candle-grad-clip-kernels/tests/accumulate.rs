//! Sums of slices beside a naive oracle: over lengths, offsets, dtypes, special values and numbers
//! of threads.
#![allow(clippy::unwrap_used)]

use candle_grad_clip_kernels::{BLOCK, Edit, Element, accumulate, round_into};
use half::{bf16, f16};

const CLEAN: Edit = Edit::Scale {
    clip_coef: 1.0,
    zero_non_finite: true,
};

/// Numbers of both signs, some of them special.
fn numbers(len: usize, seed: usize) -> Vec<f64> {
    const SPECIAL: [f64; 7] = [
        0.0,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        1e30,
        1e-30,
        6e4,
    ];
    let number = |i: usize| {
        let hash = (i + 31 * seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11;
        match hash % 32 {
            special @ 0..7 => SPECIAL[special],
            _ => hash as f64 / (1u64 << 53) as f64 - 0.5,
        }
    };
    (0..len).map(number).collect()
}

/// `a + b`, each step rounded to the wide dtype: one addition has one right answer.
fn check<E: Element>(from: impl Fn(f64) -> E, round: impl Fn(f64) -> f64)
where
    E::Wide: Into<f64>,
{
    for (edit, clean) in [(Edit::NOTHING, false), (CLEAN, true)] {
        let term = |x: E| {
            let x = x.to_f64();
            if clean && !x.is_finite() { 0.0 } else { x }
        };
        let lengths = if cfg!(miri) { 0..20 } else { 0..516 };
        for length in lengths.chain([1000, 1025]) {
            let offset = length % 16;
            let parts: Vec<Vec<E>> = (0..3)
                .map(|i| numbers(length + offset, 7 * length + i))
                .map(|values| values.into_iter().map(&from).collect())
                .collect();
            let mut sum =
                vec![<E::Wide as candle_grad_clip_kernels::Wide>::from_f64(f64::NAN); length];
            for (i, part) in parts.iter().enumerate() {
                accumulate(&part[offset..], &mut sum, edit, i == 0);
            }
            let mut target = vec![from(7.0); length];
            round_into(&sum, &mut target, 0.25);
            for (i, (sum, target)) in sum.iter().zip(&target).enumerate() {
                let [a, b, c] = [0, 1, 2].map(|part: usize| term(parts[part][offset + i]));
                let right = round(round(a + b) + c);
                let sum: f64 = (*sum).into();
                assert!(
                    sum == right || sum.is_nan() && right.is_nan(),
                    "{i} of {length}: {sum:e}, not {right:e}"
                );
                let (target, right) = (target.to_f64(), E::round(right * 0.25));
                assert!(
                    target == right || target.is_nan() && right.is_nan(),
                    "{i} of {length}, rounded: {target:e}, not {right:e}"
                );
            }
        }
    }
}

#[test]
fn sums_are_those_of_a_plain_loop() {
    check(|x| x as f32, |x| f64::from(x as f32));
    check(|x| x, |x| x);
    check(f16::from_f64, |x| f64::from(x as f32));
    check(bf16::from_f64, |x| f64::from(x as f32));
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    let parts: Vec<Vec<bf16>> = (0..3)
        .map(|i| numbers(3 * BLOCK + 77, i))
        .map(|values| values.into_iter().map(bf16::from_f64).collect())
        .collect();
    let of = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let mut sum = vec![0f32; parts[0].len()];
            for (i, part) in parts.iter().enumerate() {
                accumulate(part, &mut sum, Edit::NOTHING, i == 0);
            }
            let mut target = vec![bf16::ZERO; sum.len()];
            round_into(&sum, &mut target, 1.0 / 3.0);
            let bits: Vec<u32> = sum.iter().map(|x| x.to_bits()).collect();
            (
                bits,
                target.iter().map(|x| x.to_bits()).collect::<Vec<u16>>(),
            )
        })
    };
    let one = of(1);
    for threads in [2, 3, 8] {
        assert!(of(threads) == one, "{threads} threads");
    }
}

#[test]
#[should_panic(expected = "differ in length")]
fn accumulate_refuses_another_length() {
    accumulate(&[1f32; 2], &mut [0.0; 3], Edit::NOTHING, false);
}

#[test]
#[should_panic(expected = "differ in length")]
fn round_into_refuses_another_length() {
    round_into(&[1f32; 2], &mut [f16::ZERO; 3], 1.0);
}
