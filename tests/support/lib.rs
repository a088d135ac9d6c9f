//! What the tests share.

pub mod cases;
pub mod gradients;
pub mod optimizers;
pub mod oracle;
pub mod registry;
