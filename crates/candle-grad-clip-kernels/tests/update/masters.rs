//! Masters of parameters that the caller has set.

use candle_grad_clip_kernels::{Edit, Sgd, Update, update};
use half::{bf16, f16};

use crate::oracle::{Dtype, numbers};

/// Moves nothing where the gradient is 0.
const STANDS_STILL: Sgd = Sgd {
    lr: 0.5,
    momentum: 0.0,
    dampening: 0.0,
    weight_decay: 0.0,
    nesterov: false,
    is_first: false,
};

fn a_master_that_no_longer_rounds_to_its_parameter_is_made_anew<E: Dtype<Wide = f32>>() {
    for len in [1, 7, 255, 256, 257, 1025] {
        for set in [0, len / 2, len - 1] {
            // Rounds to 1 in both dtypes.
            let kept = 1.000_1f32;
            let (mut params, mut master) = (vec![E::of(1.0); len], vec![kept; len]);
            params[set] = E::of(5.0);
            update(
                Update {
                    params: &mut params,
                    grads: &vec![E::of(0.0); len],
                    moments: Default::default(),
                    master: &mut master,
                },
                Edit::NOTHING,
                &STANDS_STILL,
            );
            for i in 0..len {
                let (full, rounded) = if i == set { (5.0, 5.0) } else { (kept, 1.0) };
                assert_eq!(master[i].to_bits(), full.to_bits(), "{i} of {len}");
                assert_eq!(params[i].to_f64(), rounded, "{i} of {len}");
            }
        }
    }
    // A NaN stays one, and can be set away.
    for (param, expected) in [(f64::NAN, f32::NAN), (2.0, 2.0)] {
        let (mut params, mut master) = ([E::of(param)], [f32::NAN]);
        let whole = Update {
            params: &mut params,
            grads: &[E::of(0.0)],
            moments: Default::default(),
            master: &mut master,
        };
        update(whole, Edit::NOTHING, &STANDS_STILL);
        assert!(master[0] == expected || master[0].is_nan() && expected.is_nan());
    }
}

/// Sets elements to `new`, given `rounded`, which every master rounds to, and checks the masters
/// after a step that moves nothing.
fn set_from_outside<E: Dtype<Wide = f32>>(what: &str, rounded: &[E], new: &[E]) {
    // A little above, so that a copy that is made anew differs from one that is kept.
    let off = |x: &E| x.to_f64() as f32 * 1.000_1;
    let mut params = new.to_vec();
    let mut master: Vec<f32> = rounded.iter().map(off).collect();
    let whole = Update {
        params: &mut params,
        grads: &vec![E::of(0.0); new.len()],
        moments: Default::default(),
        master: &mut master,
    };
    update(whole, Edit::NOTHING, &STANDS_STILL);
    for (i, (was, is)) in rounded.iter().zip(new).enumerate() {
        let is_set = bits(*was) != bits(*is);
        let expected = if is_set { is.to_f64() as f32 } else { off(was) };
        let is_nan = master[i].is_nan() && expected.is_nan();
        assert!(
            master[i].to_bits() == expected.to_bits() || is_nan,
            "{what}: {i} of {}: {}, expected {expected}",
            new.len(),
            master[i]
        );
        assert!(bits(params[i]) == bits(*is) || is_nan, "{what}: {i}");
    }
}

/// The sign, and the rest.
fn bits<E: Dtype>(x: E) -> (bool, E::Bits) {
    (x.to_f64().is_sign_negative(), x.abs_bits())
}

fn masters_follow<E: Dtype<Wide = f32>>(next_up: impl Fn(E) -> E) {
    for len in [1, 2, 64, 1024, 1025, 3000] {
        let old: Vec<E> = numbers(len, 5).into_iter().map(E::of).collect();
        let check = |what: &str, new: &[E]| set_from_outside(what, &old, new);
        check("set to the same", &old);
        let others: Vec<E> = numbers(len, 6).into_iter().map(E::of).collect();
        check("all set", &others);
        let negated: Vec<E> = old.iter().map(|x| E::of(-x.to_f64())).collect();
        check("all negated", &negated);
        check("all zero", &vec![E::of(0.0); len]);
        for at in [0, len / 2, len - 1] {
            let one = |x: E| {
                let mut new = old.clone();
                new[at] = x;
                new
            };
            check("one ULP up", &one(next_up(old[at])));
            check("negated", &one(E::of(-old[at].to_f64())));
            check("NaN", &one(E::of(f64::NAN)));
            check("infinite", &one(E::of(f64::INFINITY)));
            let mut swapped = old.clone();
            swapped.swap(at, len - 1 - at / 2);
            check("swapped", &swapped);
        }
        let [plus, minus] = [0.0, -0.0].map(|zero| vec![E::of(zero); len]);
        set_from_outside("the sign of zero", &plus, &minus);
        set_from_outside("the sign of zero", &minus, &plus);
        let nan = vec![E::of(f64::NAN); len];
        set_from_outside("NaN set away", &nan, &old);
        set_from_outside("NaN stays", &nan, &nan);
    }
}

#[test]
fn masters_follow_parameters_that_were_set() {
    a_master_that_no_longer_rounds_to_its_parameter_is_made_anew::<f16>();
    a_master_that_no_longer_rounds_to_its_parameter_is_made_anew::<bf16>();
    masters_follow(|x: f16| f16::from_bits(x.to_bits() + 1));
    masters_follow(|x: bf16| bf16::from_bits(x.to_bits() + 1));
}
