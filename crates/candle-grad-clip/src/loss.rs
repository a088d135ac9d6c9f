//! A loss with weights and a power of the error. Its gradients often need clipping.

use candle_core::backend::BackendStorage;
use candle_core::op::Abs;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Shape, Tensor};

use crate::error::{Error, Result};

/// Weighted power loss: `mean(w |pred - target|^p)`.
///
/// The mean divides by the number of elements, not by the sum of the weights. The gradient with
/// respect to `pred` is `w p |e|^(p-1) sign(e) / n`, with `e = pred - target`. It is finite
/// everywhere for `p >= 1`, and 0 where `e` is 0. (candle's `powf` gives NaN for a negative base,
/// and may give another gradient at 0.) It grows with `|e|^(p-1)`, so training with `p` of 3 or 4
/// can explode.
///
/// `pred`, `target` and `weight` have the same float dtype, and the same shape or shapes that
/// broadcast to it. Gradients flow to all three. The result is a scalar.
///
/// # Errors
/// A `power` below 1, NaN or infinite. Shapes, dtypes or devices that do not match.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_grad_clip::loss::weighted_power;
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let pred = Var::new(&[1f64, -2.0, 5.0], &Device::Cpu)?;
/// let target = Tensor::new(&[0f64, 0.0, 5.0], &Device::Cpu)?;
/// let weight = Tensor::new(&[1f64, 2.0, 9.0], &Device::Cpu)?;
/// let loss = weighted_power(&pred, &target, &weight, 3.0)?;
/// assert!((loss.to_scalar::<f64>()? - (1.0 + 2.0 * 8.0 + 0.0) / 3.0).abs() < 1e-12);
/// let grads = loss.backward()?;
/// let grad = grads.get(&pred).unwrap().to_vec1::<f64>()?; // w 3 |e|^2 sign(e) / 3
/// assert_eq!(grad, [1.0, -8.0, 0.0]);
/// # Ok(())
/// # }
/// ```
pub fn weighted_power(
    pred: &Tensor,
    target: &Tensor,
    weight: &Tensor,
    power: f64,
) -> Result<Tensor> {
    if !(power >= 1.0 && power.is_finite()) {
        let expected = "1 or a finite value above: below 1 the gradient is infinite at 0";
        return Err(Error::InvalidOption {
            name: "power",
            value: power,
            expected,
        });
    }
    let error = pred.broadcast_sub(target)?;
    let powered = error.apply_op1(AbsPower(power))?;
    Ok(powered.broadcast_mul(weight)?.mean_all()?)
}

/// `|x|^p` with the gradient `p |x|^(p-1) sign(x)`.
struct AbsPower(f64);

impl AbsPower {
    fn forward<S: BackendStorage>(
        &self,
        storage: &S,
        layout: &Layout,
    ) -> candle_core::Result<(S, Shape)> {
        let abs = storage.unary_impl::<Abs>(layout)?;
        let shape = layout.shape().clone();
        Ok((abs.powf(&Layout::contiguous(&shape), self.0)?, shape))
    }
}

impl CustomOp1 for AbsPower {
    fn name(&self) -> &'static str {
        "abs-power"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward(s, l)
    }

    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.forward(s, l)
    }

    fn metal_fwd(
        &self,
        s: &MetalStorage,
        l: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        self.forward(s, l)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let x = x.detach(); // otherwise the gradient would carry the graph
        let slope = (x.abs()?.powf(self.0 - 1.0)? * self.0)?;
        Ok(Some(((slope * x.sign()?)? * grad)?))
    }
}
