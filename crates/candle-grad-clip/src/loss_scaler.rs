//! Loss scaling, for gradients that would underflow in f16.

use std::ops::RangeInclusive;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The scale stays in f32's normal range: from 2^-126 to 2^127.
const SCALES: RangeInclusive<f64> = f32::MIN_POSITIVE as f64..=(1u128 << 127) as f64;

/// Multiplies the loss by a scale, so that small gradients do not underflow in f16. The scale
/// adapts during training, as in PyTorch's `GradScaler`.
///
/// ```text
/// g = (gradient of scale * loss) / scale
/// overflow (an element of the gradient is NaN or infinite):  no step, scale <- scale / 2
/// growth_interval steps in a row without one:                scale <- scale * 2
/// ```
///
/// Give it to a [`ClippedOptimizer`](crate::ClippedOptimizer::with_loss_scaler), whose
/// `backward_step` then scales the loss. Unscaling needs no separate pass: `1 / scale` is part of
/// the coefficient that multiplies the gradients anyway, or part of the update in the [fused
/// optimizers](crate::optim). Norms and limits are those of the unscaled gradients. The scale is a
/// power of two, so this is exact: unless something overflows or underflows, a run in f32 is
/// bit-identical to the run without a scaler.
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
/// Compute the **loss in f32**, as above. The gradient of the scaled loss starts with the scale
/// itself, and a scale of 2^16 overflows in f16: training would start with a skipped step. bf16 has
/// the range of f32 and needs no scaler.
///
/// # Overflow and skipped steps
/// At a scale above 1, a non-finite gradient counts as an overflow of the scale. The step is
/// skipped without a warning, whatever [`Clip::non_finite`](crate::Clip::non_finite) says, and does
/// not count towards [`Clip::max_skips`](crate::Clip::max_skips). (`GradScaler` skips silently,
/// too.)
///
/// At a scale of 1 or below, scaling is not the cause, so the policy applies, and skips count. A
/// step that the policy takes leaves the scale as it is. So a broken model gives an error after at
/// most `log2(scale) + max_skips` steps, whereas `GradScaler` halves its scale towards 0.
///
/// Below 1, unscaling makes gradients larger. A step whose gradients would overflow the dtype in
/// which they are written (f16 around candle's optimizers, f32 in the fused ones) is skipped in the
/// same way, also under [`NonFinite::Zero`](crate::NonFinite::Zero). Only `Propagate` writes them.
/// The report of each skipped step says [`skipped`](crate::StepReport::skipped).
///
/// # References
/// `torch.amp.GradScaler` (PyTorch 2.15), with the same defaults. It allows any factors; here they
/// are powers of two. Micikevicius et al. (2018), "Mixed precision training".
#[derive(Debug, Clone, PartialEq)]
pub struct LossScaler(pub(crate) Scaling);

/// The form in checkpoints.
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
    /// A scale of 65536, which doubles after 2000 good steps in a row and halves after an overflow.
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
    /// Sets the initial scale: a power of two. Default: 65536.
    #[must_use]
    pub fn init_scale(mut self, init_scale: f64) -> Self {
        self.0.scale = init_scale;
        self
    }

    /// Sets the factor of the scale after [`growth_interval`](Self::growth_interval) good steps: a
    /// power of two, 1 or above. Default: 2.
    #[must_use]
    pub fn growth_factor(mut self, growth_factor: f64) -> Self {
        self.0.growth_factor = growth_factor;
        self
    }

    /// Sets the factor of the scale after an overflow: a power of two below 1. Default: 0.5.
    #[must_use]
    pub fn backoff_factor(mut self, backoff_factor: f64) -> Self {
        self.0.backoff_factor = backoff_factor;
        self
    }

    /// Sets after how many steps in a row without an overflow the scale grows, 1 or more. Default:
    /// 2000.
    #[must_use]
    pub fn growth_interval(mut self, growth_interval: u32) -> Self {
        self.0.growth_interval = growth_interval;
        self
    }

    /// Enables or disables scaling. If disabled, the scale is always 1. Default: enabled.
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

    /// Whether scaling is enabled.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.0.enabled
    }

    /// The scale of the next loss; 1 if scaling is disabled.
    #[must_use]
    pub fn current_scale(&self) -> f64 {
        if self.0.enabled { self.0.scale } else { 1.0 }
    }

    /// Steps in a row without an overflow, since the scale last changed.
    #[must_use]
    pub fn good_steps(&self) -> u32 {
        self.0.good_steps
    }

    /// The loss times the scale. An f16 or bf16 loss becomes f32 first, because the product may
    /// overflow.
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
    /// Errors of candle.
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

    /// Updates the scale after a step that was taken, or skipped because of an overflow.
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
        // The scale stays if it would leave the range. `GradScaler` keeps it if it would be
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

/// Whether this is a power of two in the range of scales.
fn is_power_of_two(x: f64) -> bool {
    const MANTISSA: u64 = (1 << 52) - 1;
    SCALES.contains(&x) && x.to_bits() & MANTISSA == 0
}
