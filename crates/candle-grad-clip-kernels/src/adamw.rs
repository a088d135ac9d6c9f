use crate::update::{MAX_MOMENTS, UpdateRule};
use crate::wide::Wide;

/// The AdamW equations, in the order of `candle_nn::AdamW` (0.11):
///
/// ```text
/// m <- beta1 m + (1 - beta1) g
/// v <- beta2 v + (1 - beta2) g^2
/// m_hat = m / (1 - beta1^step),  v_hat = v / (1 - beta2^step)
/// theta <- (1 - lr weight_decay) theta - lr m_hat / (sqrt(v_hat) + eps)
/// ```
///
/// With a third moment array (`AMSGrad`), `v_hat` uses the largest `v` so far. With two moment
/// arrays, the update is without `AMSGrad`.
///
/// # References
/// Loshchilov, Hutter (2019), "Decoupled weight decay regularization", algorithm 2; Reddi, Kale,
/// Kumar (2018), "On the convergence of Adam and beyond"; `torch.optim.AdamW` (PyTorch 2.15).
///
/// ```
/// use candle_grad_clip_kernels::{AdamW, UpdateRule};
///
/// let rule = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1 };
/// let (mut theta, mut m, mut v) = ([1f64], [0.0], [0.0]);
/// AdamW::update(&rule.numbers(), &mut theta, &[5.0], [&mut m, &mut v, &mut []]);
/// assert!((theta[0] - 0.9).abs() < 1e-9); // the first step has the length lr
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment. A value below [`Wide::SMALLEST_EPS`] is raised to
    /// it. Otherwise a zero gradient would give 0 / 0, and a gradient whose square underflows an
    /// infinite update.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The step's number, from 1.
    pub step: u64,
}

impl AdamW {
    /// The bias correction of a moment with decay rate `beta`: `1 / (1 - beta^step)`.
    #[must_use]
    pub fn scale(&self, beta: f64) -> f64 {
        let step = i32::try_from(self.step).unwrap_or(i32::MAX);
        1.0 / (1.0 - beta.powi(step))
    }
}

impl UpdateRule for AdamW {
    type Numbers<W: Wide> = Numbers<W>;

    fn numbers<W: Wide>(&self) -> Numbers<W> {
        Numbers::new(self)
    }

    #[inline(always)]
    fn update<W: Wide>(
        numbers: &Numbers<W>,
        params: &mut [W],
        grads: &[W],
        moments: [&mut [W]; MAX_MOMENTS],
    ) {
        let step = *numbers;
        let [first, second, largest] = moments;
        let elements = params.iter_mut().zip(grads).zip(first).zip(second);
        if largest.is_empty() {
            for (((theta, g), m), v) in elements {
                step.moments(*g, m, v);
                *theta = step.next(*theta, *m, *v);
            }
        } else {
            for ((((theta, g), m), v), largest) in elements.zip(largest) {
                step.moments(*g, m, v);
                // This order keeps a NaN of `v`.
                *largest = if *largest > *v { *largest } else { *v };
                *theta = step.next(*theta, *m, *largest);
            }
        }
    }
}

/// The coefficients of a step, computed in f64 and then rounded (`1 - beta2` in f32 is off by
/// 1.3e-5).
#[derive(Debug, Clone, Copy)]
pub struct Numbers<W> {
    beta1: W,
    rest1: W,
    beta2: W,
    rest2: W,
    scale_m: W,
    scale_v: W,
    decay: W,
    eps: W,
    lr: W,
}

impl<W: Wide> Numbers<W> {
    #[inline(always)]
    fn new(rule: &AdamW) -> Self {
        Self {
            beta1: W::from_f64(rule.beta1),
            rest1: W::from_f64(1.0 - rule.beta1),
            beta2: W::from_f64(rule.beta2),
            rest2: W::from_f64(1.0 - rule.beta2),
            scale_m: W::from_f64(rule.scale(rule.beta1)),
            scale_v: W::from_f64(rule.scale(rule.beta2)),
            decay: W::from_f64(1.0 - rule.lr * rule.weight_decay),
            eps: W::from_f64(rule.eps.max(W::SMALLEST_EPS)),
            lr: W::from_f64(rule.lr),
        }
    }

    #[inline(always)]
    fn moments(&self, g: W, m: &mut W, v: &mut W) {
        *m = *m * self.beta1 + g * self.rest1;
        *v = *v * self.beta2 + g * g * self.rest2;
    }

    #[inline(always)]
    fn next(&self, theta: W, m: W, v: W) -> W {
        let (m_hat, v_hat) = (m * self.scale_m, v * self.scale_v);
        theta * self.decay - m_hat / (v_hat.sqrt() + self.eps) * self.lr
    }
}
