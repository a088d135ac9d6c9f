//! What the tests share.

pub mod cases;
pub mod checkpoints;
pub mod gradients;
pub mod optim_cases;
pub mod optimizers;
pub mod oracle;
pub mod registry;
