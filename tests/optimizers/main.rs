//! The fused optimizers match candle's bit for bit.
#![allow(clippy::unwrap_used)]

mod fused;
mod refused;
mod vars;
