//! What the tests share.

pub mod cases;
pub mod checkpoints;
#[cfg(feature = "cuda-on-host")]
pub mod cuda_on_host;
pub mod device;
pub mod gradients;
pub mod optim_cases;
pub mod optimizers;
pub mod oracle;
pub mod registry;
pub mod watchdog;
