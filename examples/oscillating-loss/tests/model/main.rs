//! Model, data, training, and what the numbers of a run say.
#![allow(clippy::unwrap_used)]

mod arm;
mod arms;
mod baseline;
mod data;
mod half_precision;
mod pytorch_parity;
mod score;
mod table;
mod training;
