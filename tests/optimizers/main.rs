//! The fused optimizers are those of candle to the bit.
#![allow(clippy::unwrap_used)]

mod fused;
mod refused;
mod vars;
