use crate::update::{MAX_MOMENTS, UpdateRule};
use crate::wide::Wide;

/// The equations of stochastic gradient descent with momentum, as in PyTorch:
///
/// ```text
/// g <- g + weight_decay theta
/// b <- momentum b + (1 - dampening) g      (b <- g in a parameter's first step)
/// d = g + momentum b if nesterov, else b   (d = g without momentum)
/// theta <- theta - lr d
/// ```
///
/// Without a moment array, the update is without momentum.
///
/// # References
/// `torch.optim.SGD` (PyTorch 2.15); Sutskever, Martens, Dahl, Hinton (2013), "On the importance of
/// initialization and momentum in deep learning".
///
/// ```
/// use candle_grad_clip_kernels::{Sgd, UpdateRule};
///
/// let rule = Sgd { lr: 0.5, momentum: 0.5, dampening: 0.0, weight_decay: 0.0, nesterov: false, is_first: false };
/// let (mut theta, mut b) = ([1f64], [2.0]);
/// Sgd::update(&rule.numbers(), &mut theta, &[1.0], [&mut b, &mut [], &mut []]);
/// assert_eq!((theta, b), ([0.0], [2.0]));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Decay rate of the momentum buffer.
    pub momentum: f64,
    /// The gradient enters the momentum buffer times `1 - dampening`.
    pub dampening: f64,
    /// Weight decay, added to the gradient.
    pub weight_decay: f64,
    /// Whether to use Nesterov momentum.
    pub nesterov: bool,
    /// Whether this is the parameter's first step.
    pub is_first: bool,
}

impl UpdateRule for Sgd {
    type Numbers<W: Wide> = Numbers<W>;

    fn numbers<W: Wide>(&self) -> Numbers<W> {
        Numbers {
            lr: W::from_f64(self.lr),
            weight_decay: W::from_f64(self.weight_decay),
            momentum: W::from_f64(self.momentum),
            kept: W::from_f64(1.0 - self.dampening),
            // Skipped for 0: an infinite parameter times 0 is NaN.
            has_decay: self.weight_decay != 0.0,
            nesterov: self.nesterov,
            is_first: self.is_first,
        }
    }

    #[inline(always)]
    fn update<W: Wide>(
        numbers: &Numbers<W>,
        params: &mut [W],
        grads: &[W],
        moments: [&mut [W]; MAX_MOMENTS],
    ) {
        let [buffer, ..] = moments;
        let Numbers {
            lr,
            weight_decay,
            momentum,
            kept,
            has_decay,
            nesterov,
            is_first,
        } = *numbers;
        let decayed = |theta: W, g: W| {
            if has_decay {
                g + theta * weight_decay
            } else {
                g
            }
        };
        if buffer.is_empty() {
            for (theta, g) in params.iter_mut().zip(grads) {
                *theta = *theta - decayed(*theta, *g) * lr;
            }
            return;
        }
        for ((theta, g), b) in params.iter_mut().zip(grads).zip(buffer) {
            let g = decayed(*theta, *g);
            *b = if is_first {
                g
            } else {
                *b * momentum + g * kept
            };
            let direction = if nesterov { g + *b * momentum } else { *b };
            *theta = *theta - direction * lr;
        }
    }
}

/// The numbers of a step, rounded.
#[derive(Debug, Clone, Copy)]
pub struct Numbers<W> {
    lr: W,
    weight_decay: W,
    momentum: W,
    kept: W,
    has_decay: bool,
    nesterov: bool,
    is_first: bool,
}
