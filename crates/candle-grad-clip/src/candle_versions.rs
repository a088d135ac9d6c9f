//! What differs between the versions of candle, each with the version that makes it unnecessary.

use candle_core::Result;
use candle_core::backprop::GradStore;

/// A store without gradients. From candle 0.11 on, `GradStore` is `Default`.
#[allow(clippy::unnecessary_wraps)] // it can fail before 0.11
pub(crate) fn empty_store() -> Result<GradStore> {
    #[cfg(feature = "candle-0_11")]
    let store = GradStore::default();
    #[cfg(not(feature = "candle-0_11"))]
    let store = {
        let scalar = candle_core::Tensor::new(0f32, &candle_core::Device::Cpu)?;
        let mut store = scalar.backward()?;
        store.remove(&scalar);
        store
    };
    Ok(store)
}
