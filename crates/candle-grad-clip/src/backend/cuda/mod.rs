//! The CUDA backend: a few launches for all tensors of a device. They run on candle's own stream
//! and from the caller's thread, since candle's devices use a stream per thread.
//!
//! Every wait of a step is in [`Gpu::read`](gpu::Gpu::read) or [`Slot`](results::Slot), and
//! [`device_sync_count`] counts it.
#![allow(unsafe_code)] // kernel launches are in this module only

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
