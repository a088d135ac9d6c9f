/// The policy for gradients with NaN or infinite elements. It is the same on every device.
///
/// It checks the gradients, not the update: see [`NonFinite::SkipStep`].
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_grad_clip::{Clip, ClippedOptimizer, NonFinite};
/// use candle_nn::{Optimizer, SGD};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let bad = Tensor::new(&[f32::NAN, 1.0], &Device::Cpu)?;
/// let opt = SGD::new(vec![w.clone()], 0.1)?;
/// let mut opt = ClippedOptimizer::wrap(opt, vec![w.clone()], Clip::norm(1.0))?; // SkipStep
/// let report = opt.backward_step_report(&(&bad * w.as_tensor())?.sum_all()?)?;
/// assert!(report.skipped()?);
/// assert_eq!(w.to_vec1::<f32>()?, [3.0, 4.0]);
///
/// opt.set_clip(Clip::norm(1.0).non_finite(NonFinite::Error))?;
/// let error = opt.backward_step_report(&(&bad * w.as_tensor())?.sum_all()?).unwrap_err();
/// assert!(error.to_string().contains("var.0 with 1 NaN"));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum NonFinite {
    /// Returns an error that names the first bad Var and counts its bad elements. Nothing is
    /// changed. Like `error_if_nonfinite=True` of `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15).
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var, backprop::GradStore};
    /// # use candle_grad_clip::{ClipGradNorm, NonFinite, clip_grad_norm_with};
    /// # let vars = [Var::new(&[0f64; 3], &Device::Cpu)?];
    /// # let mut grads = GradStore::default();
    /// # grads.insert(&vars[0], Tensor::new(&[f64::NAN, 3.0, 4.0], &Device::Cpu)?);
    /// let options = ClipGradNorm { non_finite: NonFinite::Error, ..Default::default() };
    /// assert!(clip_grad_norm_with(&mut grads, &vars, &options).is_err()); // of (NaN, 3, 4)
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    Error,
    /// The step is skipped: weights and optimizer state stay as they are, and a warning says why.
    /// More than [`Clip::max_skips`](crate::Clip::max_skips) in a row are an error. A free function
    /// has no step to skip: it leaves the gradients as they are.
    ///
    /// The policy checks the gradients, not the update. Without a finite limit, finite gradients
    /// near the dtype's largest number can make weights NaN or infinite (3e38 times a learning rate
    /// of 10 in f32). This applies to [`Clip::none`](crate::Clip::none), to infinite limits and to
    /// the first step of [`Clip::quantile`](crate::Clip::quantile). A limit of ordinary size keeps
    /// the update finite.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var, backprop::GradStore};
    /// # use candle_grad_clip::{ClipGradNorm, NonFinite, clip_grad_norm_with};
    /// # let vars = [Var::new(&[0f64; 3], &Device::Cpu)?];
    /// # let mut grads = GradStore::default();
    /// # grads.insert(&vars[0], Tensor::new(&[f64::NAN, 3.0, 4.0], &Device::Cpu)?);
    /// let options = ClipGradNorm { non_finite: NonFinite::SkipStep, ..Default::default() };
    /// assert!(clip_grad_norm_with(&mut grads, &vars, &options)?.is_nan()); // of (NaN, 3, 4)
    /// assert_eq!(grads.get(&vars[0]).unwrap().to_vec1::<f64>()?[1..], [3.0, 4.0]);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    SkipStep,
    /// Non-finite elements become 0. Then the gradients are clipped by the norm of their finite
    /// elements.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var, backprop::GradStore};
    /// # use candle_grad_clip::{ClipGradNorm, NonFinite, clip_grad_norm_with};
    /// # let vars = [Var::new(&[0f64; 3], &Device::Cpu)?];
    /// # let mut grads = GradStore::default();
    /// # grads.insert(&vars[0], Tensor::new(&[f64::NAN, 3.0, 4.0], &Device::Cpu)?);
    /// let options = ClipGradNorm { non_finite: NonFinite::Zero, ..Default::default() };
    /// assert_eq!(clip_grad_norm_with(&mut grads, &vars, &options)?, 5.0); // of (NaN, 3, 4)
    /// assert_eq!(grads.get(&vars[0]).unwrap().to_vec1::<f64>()?[0], 0.0);
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    Zero,
    /// As in PyTorch. Under a norm clip, a NaN makes every gradient NaN, and an infinity makes
    /// itself NaN and the finite elements 0. Under a value clip, an infinity becomes the bound.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var, backprop::GradStore};
    /// # use candle_grad_clip::{ClipGradNorm, NonFinite, clip_grad_norm_with};
    /// # let vars = [Var::new(&[0f64; 3], &Device::Cpu)?];
    /// # let mut grads = GradStore::default();
    /// # grads.insert(&vars[0], Tensor::new(&[f64::NAN, 3.0, 4.0], &Device::Cpu)?);
    /// let options = ClipGradNorm { non_finite: NonFinite::Propagate, ..Default::default() };
    /// assert!(clip_grad_norm_with(&mut grads, &vars, &options)?.is_nan()); // of (NaN, 3, 4)
    /// assert!(grads.get(&vars[0]).unwrap().to_vec1::<f64>()?.iter().all(|g| g.is_nan()));
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    Propagate,
}
