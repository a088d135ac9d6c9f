use candle_core::Var;
use candle_core::backprop::GradStore;

pub use candle_grad_clip_kernels::NormType;

use crate::functions::check_any_match;
use crate::measure::{Request, measure};
use crate::vars::VarList;
use crate::{Error, Result};

/// The norm of the gradients of `vars`, all seen as one vector: `(sum |g|^p)^(1/p)`.
///
/// Gradients of any shape, in f32, f64, f16 or bf16, mixed, on any devices; they are read once and
/// not changed. Vars without a gradient count nothing, a Var listed twice counts once, and
/// gradients of anything but `vars` are left out (a [`GradStore`] also holds those of constants).
///
/// On CPU the relative error is at most 1e-12 for L1, L2, infinity and `p >= 0.5`, in every dtype:
/// f32 gradients of `1e25` or `1e-25` and f64 ones of `1e200` have their right norm, where PyTorch,
/// TensorFlow and optax give infinity and 0. The bits do not depend on the number of threads.
///
/// Returns NaN if any element is NaN, else infinity if any is infinite, or if the norm of finite
/// elements passes f64's maximum (they are still clipped by their right coefficient, which is 0 where
/// f64 does not hold it).
///
/// # Errors
/// An invalid `norm_type`; a gradient whose shape, dtype or device is not its Var's, or whose dtype
/// is not one of the four; a store that has gradients, but none for any of `vars`.
///
/// # References
/// `torch.nn.utils.get_total_norm` (PyTorch 2.15), `tf.linalg.global_norm` (TensorFlow 2.21).
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::{NormType, total_norm};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?; // the gradient is w itself
/// assert_eq!(total_norm(&grads, &[w.clone()], NormType::L2)?, 5.0);
/// assert_eq!(total_norm(&grads, &[w], NormType::Inf)?, 4.0);
/// # Ok(())
/// # }
/// ```
pub fn total_norm(grads: &GradStore, vars: &[Var], norm_type: NormType) -> Result<f64> {
    let request = Request::norm(checked(norm_type)?);
    check_any_match(vars, grads)?;
    Ok(measure(VarList::unnamed(vars), grads, request)?.total_norm())
}

/// The norm type, if it makes a norm.
pub(crate) fn checked(norm_type: NormType) -> Result<NormType> {
    if norm_type.is_valid() {
        Ok(norm_type)
    } else {
        Err(Error::InvalidNormType { p: norm_type.p() })
    }
}
