//! Optimizer steps beside a naive oracle: over lengths, offsets, dtypes, edits and special values.

mod masters;
mod oracle;

use candle_grad_clip_kernels::{AdamW, BLOCK, Edit, Sgd, Update, Wide, edit_into, update};
use half::{bf16, f16};

use oracle::{
    ADAMW, Dtype, EDITS, SGD, SMALLEST_NORMAL, adamw_oracle, numbers, run, scale, sgd_oracle,
    to_f64, wide,
};

#[derive(Clone, Copy)]
enum Equation {
    AdamW(AdamW, bool),
    Sgd(Sgd, bool),
}

fn check<E: Dtype>(len: usize, offset: usize, edit: Edit, equation: Equation, master: bool)
where
    E::Wide: Into<f64>,
{
    let mut grads = numbers(len, 2);
    for (i, special) in [f64::INFINITY, f64::NAN, 0.0, f64::NEG_INFINITY]
        .into_iter()
        .enumerate()
    {
        if len > 40 && i % 2 == 0 {
            grads[7 * i + 5] = special; // infinite and zero
        }
        if len > 100 && i % 2 == 1 {
            grads[7 * i + 60] = special; // NaN and infinite
        }
    }
    let outcome = match equation {
        Equation::AdamW(rule, amsgrad) => run::<E>(
            len,
            offset,
            edit,
            &rule,
            2 + usize::from(amsgrad),
            master,
            &grads,
        ),
        Equation::Sgd(rule, momentum) => run::<E>(
            len,
            offset,
            edit,
            &rule,
            usize::from(momentum),
            master,
            &grads,
        ),
    };
    // The edited gradient is tested elsewhere; halves are not rounded here, so in the wide dtype.
    let mut edited = vec![E::Wide::from_f64(0.0); len];
    let as_wide: Vec<E::Wide> = grads
        .iter()
        .map(|x| E::Wide::from_f64(E::of(*x).to_f64()))
        .collect();
    edit_wide(&as_wide, &mut edited, edit);
    let start: Vec<f64> = numbers(len, if master { 14 } else { 1 });
    let [m, v, max] = [11, 12, 13].map(|seed| numbers(len, seed));
    for i in 0..len {
        let g: f64 = edited[i].into();
        let theta: f64 = if master {
            E::Wide::from_f64(start[i].abs()).into()
        } else {
            E::of(start[i]).to_f64()
        };
        let round = |x: f64| -> f64 { E::Wide::from_f64(x).into() };
        let (mut m, mut v, mut max) = (round(m[i]), round(v[i].abs()), round(max[i].abs()));
        let expected = match equation {
            Equation::AdamW(rule, amsgrad) => {
                adamw_oracle(rule, theta, g, &mut m, &mut v, amsgrad.then_some(&mut max))
            }
            Equation::Sgd(rule, momentum) => sgd_oracle(rule, theta, g, momentum.then_some(&mut m)),
        };
        let what = format!("{i} of {len} at {offset}, {edit:?}");
        let close = |got: f64, expected: f64, rounding: f64| {
            let size = expected
                .abs()
                .max(theta.abs())
                .max(if expected.is_finite() {
                    0.01 * g.abs()
                } else {
                    0.0
                });
            (got.is_nan() && expected.is_nan())
                || got == expected
                || (got - expected).abs()
                    <= E::TOLERANCE * size + rounding * expected.abs().max(SMALLEST_NORMAL)
        };
        assert!(
            close(outcome.params[i], expected, E::ROUNDING),
            "{what}: {} {expected}",
            outcome.params[i]
        );
        if master {
            assert!(close(outcome.master[i], expected, 0.0), "{what}: master");
            let rounded = E::of(outcome.master[i]).to_f64();
            let same =
                outcome.params[i] == rounded || rounded.is_nan() && outcome.params[i].is_nan();
            assert!(same, "{what}: not the rounded master");
        }
        let near =
            |got: Option<&f64>, expected: f64| got.is_none_or(|got| close(*got, expected, 0.0));
        assert!(near(outcome.moments[0].get(i), m), "{what}: first");
        assert!(near(outcome.moments[1].get(i), v), "{what}: second");
        assert!(
            near(outcome.moments[2].get(i), max) || v.is_nan(),
            "{what}: largest"
        );
    }
}

fn edit_wide<W: Wide + Into<f64>>(source: &[W], target: &mut [W], edit: Edit) {
    // f32 and f64 are elements themselves: go by way of f64 slices of the right width.
    let values: Vec<f64> = source.iter().map(|x| (*x).into()).collect();
    if size_of::<W>() == 4 {
        let source: Vec<f32> = values.iter().map(|x| *x as f32).collect();
        let mut edited = vec![0f32; source.len()];
        edit_into(&source, &mut edited, edit);
        for (y, x) in target.iter_mut().zip(edited) {
            *y = W::from_f64(x.into());
        }
    } else {
        let mut edited = vec![0f64; values.len()];
        edit_into(&values, &mut edited, edit);
        for (y, x) in target.iter_mut().zip(edited) {
            *y = W::from_f64(x);
        }
    }
}

fn equations() -> Vec<Equation> {
    let plain = Sgd {
        momentum: 0.0,
        dampening: 0.0,
        weight_decay: 0.0,
        ..SGD
    };
    vec![
        Equation::AdamW(ADAMW, false),
        Equation::AdamW(ADAMW, true),
        Equation::Sgd(plain, false),
        Equation::Sgd(SGD, true),
        Equation::Sgd(
            Sgd {
                is_first: true,
                ..SGD
            },
            true,
        ),
        Equation::Sgd(
            Sgd {
                nesterov: true,
                dampening: 0.0,
                ..SGD
            },
            true,
        ),
    ]
}

fn sweep<E: Dtype>()
where
    E::Wide: Into<f64>,
{
    let masters: &[bool] = if size_of::<E>() == 2 {
        &[false, true]
    } else {
        &[false]
    };
    // Miri is slow.
    let (lengths, offsets) = if cfg!(miri) { (40, 2) } else { (516, 16) };
    for equation in equations() {
        for &master in masters {
            for len in 0..lengths {
                check::<E>(
                    len,
                    len % offsets,
                    EDITS[len % EDITS.len()],
                    equation,
                    master,
                );
            }
            for edit in EDITS {
                for offset in 0..offsets {
                    check::<E>(130, offset, edit, equation, master);
                }
            }
        }
    }
}

#[test]
fn f32_steps_are_those_of_the_oracle() {
    sweep::<f32>();
}

#[test]
fn f64_steps_are_those_of_the_oracle() {
    sweep::<f64>();
}

#[test]
fn f16_steps_are_those_of_the_oracle() {
    sweep::<f16>();
}

#[test]
fn bf16_steps_are_those_of_the_oracle() {
    sweep::<bf16>();
}

/// More than one block: cut in parallel, and the same bits as one element at a time.
#[test]
fn large_parameters_are_the_same_for_any_number_of_threads() {
    let len = if cfg!(miri) { 100 } else { 5 * BLOCK + 123 };
    let grads = numbers(len, 2);
    let of = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.expect("threads")
            .install(|| run::<f32>(len, 0, scale(0.3, false), &ADAMW, 2, false, &grads))
    };
    let one = of(1);
    for threads in [2, 3, 8] {
        let other = of(threads);
        assert!(
            one.params == other.params && one.moments == other.moments,
            "{threads}"
        );
    }
    // The plain equation, an operation at a time in f32.
    let (mut theta, mut m, mut v) = (
        wide::<f32>(&numbers(len, 1)),
        wide::<f32>(&numbers(len, 11)),
        numbers(len, 12),
    );
    for x in &mut v {
        *x = x.abs();
    }
    let v: Vec<f32> = wide(&v);
    for i in 0..len {
        let g = grads[i] as f32 * 0.3f64 as f32;
        m[i] = m[i] * 0.9f64 as f32 + g * (1.0 - 0.9f64) as f32;
        let second = v[i] * 0.999f64 as f32 + g * g * (1.0 - 0.999f64) as f32;
        let m_hat = m[i] * ADAMW.scale(0.9) as f32;
        let v_hat = second * ADAMW.scale(0.999) as f32;
        theta[i] = theta[i] * (1.0 - 0.01 * 0.1f64) as f32 - m_hat / (v_hat.sqrt() + 1e-8) * 0.01;
    }
    assert!(to_f64(&theta) == one.params, "bits");
}

#[test]
#[should_panic(expected = "differ in length")]
fn other_lengths_are_refused() {
    let update_of_two = Update {
        params: &mut [1f32, 2.0],
        grads: &[1.0],
        moments: Default::default(),
        master: &mut [],
    };
    update(update_of_two, Edit::NOTHING, &SGD);
}
