//! The answers, worked out the slow and plain way.

use candle_nn::ParamsAdamW;

/// Neumaier's compensated sum.
pub(crate) fn sum(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0f64, 0f64);
    for x in values {
        let next = sum + x;
        lost += if sum.abs() >= x.abs() {
            (sum - next) + x
        } else {
            (x - next) + sum
        };
        sum = next;
    }
    sum + lost
}

/// The L2 norm in f64.
pub(crate) fn l2_norm(values: impl Iterator<Item = f64>) -> f64 {
    sum(values.map(|x| x * x)).sqrt()
}

/// A parameter after steps with these gradients, from moments of zero: AdamW's equation in f64.
pub(crate) fn adamw(start: f64, gradients: &[f64], params: &ParamsAdamW) -> f64 {
    let (mut theta, mut m, mut v) = (start, 0.0, 0.0);
    for (step, g) in (1..).zip(gradients) {
        m = params.beta1 * m + (1.0 - params.beta1) * g;
        v = params.beta2 * v + (1.0 - params.beta2) * g * g;
        let m_hat = m / (1.0 - params.beta1.powi(step));
        let v_hat = v / (1.0 - params.beta2.powi(step));
        theta -= params.lr * params.weight_decay * theta;
        theta -= params.lr * m_hat / (v_hat.sqrt() + params.eps);
    }
    theta
}

/// The same of plain gradient descent.
pub(crate) fn sgd(start: f64, gradients: &[f64], lr: f64) -> f64 {
    start - lr * gradients.iter().sum::<f64>()
}

#[cfg(test)]
mod tests {
    #[test]
    fn small_terms_are_not_lost_beside_a_large_one() {
        let values = std::iter::once(1e8).chain(std::iter::repeat_n(1.0, 1_000_000));
        assert_eq!(super::l2_norm(values), (1e16f64 + 1e6).sqrt());
        assert_eq!(super::l2_norm([3.0, 4.0].into_iter()), 5.0);
    }
}
