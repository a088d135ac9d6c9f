//! What the tests share.

pub mod again;
pub mod cases;
pub mod checkpoints;
#[cfg(feature = "cuda-on-host")]
pub mod cuda_on_host;
pub mod device;
pub mod events;
pub mod function_cases;
pub mod gradients;
pub mod net;
pub mod optimizer_cases;
pub mod optimizer_differences;
pub mod optimizers;
pub mod oracle;
pub mod registry;
pub mod watchdog;
