//! unscale: the scale of a loss whose gradients would vanish in half precision.

use std::ops::RangeInclusive;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The scale stays in f32's normal range: from 2^-126 to 2^127.
const SCALES: RangeInclusive<f64> = f32::MIN_POSITIVE as f64..=(1u128 << 127) as f64;

/// Multiplies the loss by a scale, so that small gradients do not vanish in f16, and finds that
/// scale while training: PyTorch's `GradScaler`.
///
/// ```text
/// g = (gradient of scale * loss) / scale
/// overflow (an element of the gradient is NaN or infinite):  no step, scale <- scale / 2
/// growth_interval steps in a row without one:                scale <- scale * 2
/// ```
///
/// It goes into a [`ClippedOptimizer`](crate::ClippedOptimizer::with_loss_scaler), whose
/// `backward_step` then scales the loss, and which unscales in no pass of its own: `1 / scale` is a
/// factor of the coefficient that the gradients are multiplied by anyway (or that goes into the
/// update of the [fused optimizers](crate::optim)). Norms and limits are those of the unscaled
/// gradients. As the scale is a power of two, this is exact: where nothing overflows or vanishes, a
/// run in f32 has the bits of the run without it.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_grad_clip::optim::AdamW;
/// use candle_grad_clip::{Clip, ClippedOptimizer, LossScaler};
/// use candle_nn::{Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let varmap = VarMap::new();
/// let vb = VarBuilder::from_varmap(&varmap, DType::F16, &Device::Cpu);
/// let model = candle_nn::linear(4, 1, vb)?;
/// let opt = AdamW::from_named_vars(&varmap, ParamsAdamW::default())?.master_weights(true);
/// let opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?;
/// let mut opt = opt.with_loss_scaler(LossScaler::default())?;
///
/// let x = Tensor::ones((8, 4), DType::F16, &Device::Cpu)?;
/// let y = model.forward(&x)?.to_dtype(DType::F32)?; // the loss in f32
/// opt.backward_step(&y.sqr()?.mean_all()?)?; // scales, unscales, clips, steps
/// println!("scale {}", opt.loss_scaler().unwrap().current_scale());
/// # Ok(())
/// # }
/// ```
///
/// Compute the **loss in f32**, as above: in f16 its own gradient, which is the scale, overflows
/// from 2^16 on, so that training starts with a skipped step. bf16 has f32's range and needs no
/// scaler.
///
/// # Overflow and skipped steps
/// At a scale above 1 a gradient that is not finite is the scale's fault: the step is skipped
/// without a warning, whatever [`Clip::non_finite`](crate::Clip::non_finite) says, and not counted
/// towards [`Clip::max_skips`](crate::Clip::max_skips), as `GradScaler` skips in silence while it
/// looks for its scale. At 1 or below there is nothing left to blame it on, so the policy has its
/// say (a step that it takes all the same leaves the scale as it is), and skips count: a model that
/// is really broken comes to an error after at most `log2(scale) + max_skips` steps, where
/// `GradScaler` halves on towards 0. Below 1, unscaling makes gradients larger: a step whose
/// gradients would be infinite in what they are written in (f16 around candle's optimizers, f32 in
/// the fused ones) is skipped in the same way, also under
/// [`NonFinite::Zero`](crate::NonFinite::Zero); only `Propagate` writes them. The report says
/// [`skipped`](crate::StepReport::skipped) each time.
///
/// # References
/// `torch.amp.GradScaler` (PyTorch 2.15), whose defaults these are; it takes any factors, here they
/// are powers of two. Micikevicius et al. (2018), "Mixed precision training".
#[derive(Debug, Clone, PartialEq)]
pub struct LossScaler(pub(crate) Scaling);

/// As checkpoints write it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scaling {
    scale: f64,
    growth_factor: f64,
    backoff_factor: f64,
    growth_interval: u32,
    enabled: bool,
    good_steps: u32,
}

impl Default for LossScaler {
    /// Scale 65536, times 2 after 2000 good steps in a row, times 0.5 after an overflow.
    fn default() -> Self {
        Self(Scaling {
            scale: 65536.0,
            growth_factor: 2.0,
            backoff_factor: 0.5,
            growth_interval: 2000,
            enabled: true,
            good_steps: 0,
        })
    }
}

impl LossScaler {
    /// The first scale: a power of two. Default: 65536.
    #[must_use]
    pub fn init_scale(mut self, init_scale: f64) -> Self {
        self.0.scale = init_scale;
        self
    }

    /// What the scale is multiplied by after [`growth_interval`](Self::growth_interval) good steps:
    /// a power of two, 1 or above. Default: 2.
    #[must_use]
    pub fn growth_factor(mut self, growth_factor: f64) -> Self {
        self.0.growth_factor = growth_factor;
        self
    }

    /// What the scale is multiplied by after an overflow: a power of two below 1. Default: 0.5.
    #[must_use]
    pub fn backoff_factor(mut self, backoff_factor: f64) -> Self {
        self.0.backoff_factor = backoff_factor;
        self
    }

    /// Steps in a row without an overflow after which the scale grows, 1 or more. Default: 2000.
    #[must_use]
    pub fn growth_interval(mut self, growth_interval: u32) -> Self {
        self.0.growth_interval = growth_interval;
        self
    }

    /// Whether it does anything: with `false` the scale is 1 and stays so. Default: yes.
    ///
    /// ```
    /// use candle_grad_clip::LossScaler;
    ///
    /// # let dtype = candle_core::DType::BF16;
    /// let scaler = LossScaler::default().enabled(dtype == candle_core::DType::F16);
    /// assert_eq!(scaler.current_scale(), 1.0);
    /// ```
    #[must_use]
    pub fn enabled(mut self, enabled: bool) -> Self {
        self.0.enabled = enabled;
        self
    }

    /// Whether it does anything.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.0.enabled
    }

    /// The scale that the next loss is multiplied by; 1 if it is not enabled.
    #[must_use]
    pub fn current_scale(&self) -> f64 {
        if self.0.enabled { self.0.scale } else { 1.0 }
    }

    /// Steps in a row without an overflow, since the scale last changed.
    #[must_use]
    pub fn good_steps(&self) -> u32 {
        self.0.good_steps
    }

    /// The loss times the scale; an f16 or bf16 loss becomes f32 first, as it may not hold the
    /// product.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_grad_clip::LossScaler;
    ///
    /// let loss = Tensor::new(0.5f32, &Device::Cpu)?;
    /// let scaled = LossScaler::default().scale(&loss)?;
    /// assert_eq!(scaled.to_scalar::<f32>()?, 32768.0);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of candle.
    pub fn scale(&self, loss: &Tensor) -> Result<Tensor> {
        let scale = self.current_scale();
        if scale == 1.0 {
            return Ok(loss.clone());
        }
        let is_half = matches!(loss.dtype(), DType::F16 | DType::BF16);
        let loss = if is_half {
            loss.to_dtype(DType::F32)?
        } else {
            loss.clone()
        };
        Ok((loss * scale)?)
    }

    /// A step was taken, or skipped for its overflow.
    pub(crate) fn update(&mut self, overflow: bool) {
        let Scaling {
            scale,
            growth_factor,
            backoff_factor,
            growth_interval,
            enabled,
            good_steps,
        } = &mut self.0;
        if !*enabled {
            return;
        }
        let mut factor = 1.0;
        if overflow {
            factor = *backoff_factor;
            *good_steps = 0;
        } else {
            *good_steps += 1;
            if good_steps >= growth_interval {
                factor = *growth_factor;
                *good_steps = 0;
            }
        }
        // Where it would leave the range it stays, as `GradScaler`'s does where it would be
        // infinite.
        if SCALES.contains(&(*scale * factor)) {
            *scale *= factor;
        }
    }

    /// Checks every field.
    pub(crate) fn check(&self) -> Result<()> {
        let invalid = |name, value, expected| {
            Err(Error::InvalidOption {
                name,
                value,
                expected,
            })
        };
        let Scaling {
            scale,
            growth_factor,
            backoff_factor,
            growth_interval,
            good_steps,
            ..
        } = self.0;
        if !is_power_of_two(scale) {
            return invalid("init_scale", scale, "a power of two from 2^-126 to 2^127");
        }
        if !is_power_of_two(growth_factor) || growth_factor < 1.0 {
            return invalid("growth_factor", growth_factor, "a power of two, 1 or above");
        }
        if !is_power_of_two(backoff_factor) || backoff_factor >= 1.0 {
            return invalid("backoff_factor", backoff_factor, "a power of two below 1");
        }
        if growth_interval == 0 {
            return invalid("growth_interval", 0.0, "1 or more");
        }
        if good_steps >= growth_interval {
            let expected = "a number below growth_interval";
            return invalid("good_steps", good_steps.into(), expected);
        }
        Ok(())
    }
}

/// In the range of scales.
fn is_power_of_two(x: f64) -> bool {
    const MANTISSA: u64 = (1 << 52) - 1;
    SCALES.contains(&x) && x.to_bits() & MANTISSA == 0
}
