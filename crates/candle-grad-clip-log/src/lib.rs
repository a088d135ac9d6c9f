//! What a training run leaves behind, for any candle training loop.

#![deny(unsafe_code)]

pub mod page;
