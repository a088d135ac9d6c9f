//! The equations by the book, in f64, and the kernel run on the same numbers.

use candle_grad_clip_kernels::{
    AdamW, Edit, Element, MAX_MOMENTS, Sgd, Update, UpdateRule, Wide, update,
};
use half::{bf16, f16};

pub(crate) const ADAMW: AdamW = AdamW {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.1,
    step: 3,
};
pub(crate) const SGD: Sgd = Sgd {
    lr: 0.01,
    momentum: 0.9,
    dampening: 0.25,
    weight_decay: 0.1,
    nesterov: false,
    is_first: false,
};
pub(crate) const EDITS: [Edit; 5] = [
    Edit::NOTHING,
    scale(0.3, false),
    scale(0.3, true),
    Edit::Clamp {
        clip_value: 0.25,
        clip_coef: 1.0,
        zero_non_finite: false,
    },
    Edit::Clamp {
        clip_value: 0.25,
        clip_coef: 0.125,
        zero_non_finite: true,
    },
];

pub(crate) const fn scale(clip_coef: f64, zero_non_finite: bool) -> Edit {
    Edit::Scale {
        clip_coef,
        zero_non_finite,
    }
}

/// Of f16: below it a rounding is no longer relative.
pub(crate) const SMALLEST_NORMAL: f64 = 6.1e-5;

/// AdamW by the book, in f64.
pub(crate) fn adamw_oracle(
    rule: AdamW,
    theta: f64,
    g: f64,
    m: &mut f64,
    v: &mut f64,
    max: Option<&mut f64>,
) -> f64 {
    *m = rule.beta1 * *m + (1.0 - rule.beta1) * g;
    *v = rule.beta2 * *v + (1.0 - rule.beta2) * g * g;
    let second = match max {
        Some(max) => {
            *max = max.max(*v);
            *max
        }
        None => *v,
    };
    let m_hat = *m / (1.0 - rule.beta1.powi(rule.step as i32));
    let v_hat = second / (1.0 - rule.beta2.powi(rule.step as i32));
    theta - rule.lr * rule.weight_decay * theta - rule.lr * m_hat / (v_hat.sqrt() + rule.eps)
}

/// SGD by the book, in f64.
pub(crate) fn sgd_oracle(rule: Sgd, theta: f64, g: f64, buffer: Option<&mut f64>) -> f64 {
    let g = g + rule.weight_decay * theta;
    let direction = match buffer {
        None => g,
        Some(b) => {
            *b = if rule.is_first {
                g
            } else {
                rule.momentum * *b + (1.0 - rule.dampening) * g
            };
            if rule.nesterov {
                g + rule.momentum * *b
            } else {
                *b
            }
        }
    };
    theta - rule.lr * direction
}

/// Numbers of both signs between 1e-3 and 10, seeded.
pub(crate) fn numbers(len: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..len)
        .map(|_| (if next() < 0.5 { -1.0 } else { 1.0 }) * 10f64.powf(4.0 * next() - 3.0))
        .collect()
}

pub(crate) trait Dtype: Element {
    fn of(x: f64) -> Self;
    /// A few roundings of the wide dtype, and one of this.
    const TOLERANCE: f64;
    const ROUNDING: f64;
}

macro_rules! dtype {
    ($t:ty, $of:expr, $tolerance:expr, $rounding:expr) => {
        impl Dtype for $t {
            fn of(x: f64) -> Self {
                let of: fn(f64) -> Self = $of;
                of(x)
            }
            const TOLERANCE: f64 = $tolerance;
            const ROUNDING: f64 = $rounding;
        }
    };
}

dtype!(f64, |x| x, 1e-14, 0.0);
dtype!(f32, |x| x as f32, 2e-6, 0.0);
// By way of f32: `half`'s own way from f64 loses the bits that break a tie.
dtype!(f16, |x| f16::from_f32(x as f32), 2e-6, 5e-4);
dtype!(bf16, |x| bf16::from_f32(x as f32), 2e-6, 4e-3);

pub(crate) fn wide<W: Wide>(values: &[f64]) -> Vec<W> {
    values.iter().map(|x| W::from_f64(*x)).collect()
}

pub(crate) fn to_f64<W: Wide + Into<f64>>(values: &[W]) -> Vec<f64> {
    values.iter().map(|x| (*x).into()).collect()
}

/// Rows, for each element: parameter, moments, master.
pub(crate) struct Outcome {
    pub(crate) params: Vec<f64>,
    pub(crate) moments: [Vec<f64>; MAX_MOMENTS],
    pub(crate) master: Vec<f64>,
}

/// Runs the kernel on slices that start at `offset` of their memory.
pub(crate) fn run<E: Dtype>(
    len: usize,
    offset: usize,
    edit: Edit,
    rule: &impl UpdateRule,
    moments: usize,
    master: bool,
    grads: &[f64],
) -> Outcome
where
    E::Wide: Into<f64>,
{
    let of = |values: &[f64]| -> Vec<E> {
        let pad = vec![E::of(0.0); offset];
        pad.into_iter()
            .chain(values.iter().map(|x| E::of(*x)))
            .collect()
    };
    let array = |seed: u64, on: bool| -> Vec<E::Wide> {
        let values = numbers(if on { len } else { 0 }, seed);
        // Second moments are not negative.
        let values: Vec<f64> = values
            .into_iter()
            .map(|x| if seed == 11 { x } else { x.abs() })
            .collect();
        wide(&[vec![0.0; if on { offset } else { 0 }], values].concat())
    };
    let grads = of(grads);
    let mut arrays = [
        array(11, moments > 0),
        array(12, moments > 1),
        array(13, moments > 2),
    ];
    let mut full = array(14, master);
    let mut params = if master {
        full.iter().map(|x| E::of((*x).into())).collect()
    } else {
        of(&numbers(len, 1))
    };
    let start = |slice: &[E::Wide]| offset.min(slice.len());
    let [a, b, c] = &mut arrays;
    let (sa, sb, sc, sm) = (start(a), start(b), start(c), start(&full));
    update(
        Update {
            params: &mut params[offset..],
            grads: &grads[offset..],
            moments: [&mut a[sa..], &mut b[sb..], &mut c[sc..]],
            master: &mut full[sm..],
        },
        edit,
        rule,
    );
    assert!(
        params[..offset].iter().all(|x| x.to_f64() == 0.0),
        "what is before is left alone"
    );
    Outcome {
        params: params[offset..].iter().map(|x| x.to_f64()).collect(),
        moments: [to_f64(&a[sa..]), to_f64(&b[sb..]), to_f64(&c[sc..])],
        master: to_f64(&full[sm..]),
    }
}
