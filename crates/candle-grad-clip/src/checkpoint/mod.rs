//! Checkpoints: the state of an optimizer, its hyper-parameters and its clipping, in one
//! safetensors file.
//!
//! Tensors are named `<Var>.<array>` (see [`Settings::moments`](crate::optim::Settings::moments),
//! and `<Var>.master`) and have their Var's shape. No array's name has a dot, so Vars with
//! different names never have tensors with the same name. A
//! [`CheckpointHeader`](header::CheckpointHeader) in the file's metadata describes the tensors.
//! Loading has three steps: read the header, check everything, read the numbers into new state.
//! Then the caller installs the new state, which cannot fail.

mod atomic_write;
mod fault;
mod file;
mod header;
mod load;
mod match_vars;
mod names;
mod numbers;
mod optimizers;
mod save;
mod training;
mod wrapper;

pub use training::{Checkpoint, Checkpoints};
