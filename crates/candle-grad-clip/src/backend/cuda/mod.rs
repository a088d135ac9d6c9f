//! Our kernels on NVIDIA GPUs: a few launches for all tensors of a device, on candle's own stream,
//! from the caller's thread (candle's devices use a stream per thread).
//!
//! Everything that waits for the GPU is in [`Gpu::read`](gpu::Gpu::read) and
//! [`Slot`](results::Slot), and counted by [`device_sync_count`].
#![allow(unsafe_code)] // kernels are launched here, and nowhere else

mod edit;
mod gpu;
mod layout;
mod measure;
mod results;
mod step;
mod table;
mod update;

pub(crate) use edit::edit;
pub use gpu::device_sync_count;
pub(crate) use measure::measure;
pub(crate) use step::start_steps;
pub(crate) use update::update;
