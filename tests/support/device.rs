//! Where the tests run: on CPU, or with the feature `cuda` and `TEST_DEVICE=cuda` in the
//! environment on the first GPU.

use std::sync::OnceLock;

use anyhow::Result;
use candle_core::Device;
use candle_grad_clip::backend::{self, Backend};
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

/// The device of all tensors.
///
/// # Panics
/// If `TEST_DEVICE` names one that can't be had: a test that quietly ran elsewhere would prove
/// nothing.
#[must_use]
#[allow(clippy::panic)]
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| match std::env::var("TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => match Device::new_cuda(0) {
            Ok(device) => device,
            Err(error) => panic!("TEST_DEVICE=cuda: {error}"),
        },
        Ok(other) => panic!("TEST_DEVICE is {other}, expected cpu or cuda"),
    })
}

/// The backend of our own kernels there.
#[must_use]
pub fn kernels() -> Backend {
    if device().is_cuda() {
        Backend::Cuda
    } else {
        Backend::Cpu
    }
}

/// The backends that can handle a tensor there.
#[must_use]
pub fn backends() -> [Backend; 2] {
    [kernels(), Backend::CandleOps]
}

/// Runs a body on each of [`backends`]; an error names the backend.
///
/// # Errors
/// The first of the body's.
pub fn on_every_backend(body: impl Fn() -> Result<()>) -> Result<()> {
    backends().into_iter().try_for_each(|backend| {
        backend::with_backend(backend, &body).map_err(|e| e.context(format!("{backend:?}")))
    })
}

/// A pool of so many threads.
///
/// # Errors
/// If the system starts no more threads.
pub fn pool(threads: usize) -> Result<ThreadPool, ThreadPoolBuildError> {
    ThreadPoolBuilder::new().num_threads(threads).build()
}
