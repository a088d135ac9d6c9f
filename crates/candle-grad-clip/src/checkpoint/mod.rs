//! Checkpoints: the state of an optimizer, its hyper-parameters and its clipping, in one
//! safetensors file.
//!
//! Tensors are named `<Var>.<array>` (see [`Settings::moments`](crate::optim::Settings::moments),
//! and `<Var>.master`) and shaped as their Var is. As no array's name has a dot, no two Vars of
//! different names have a tensor of one name. What the tensors are is said by a
//! [`CheckpointHeader`](header::CheckpointHeader) in the file's metadata. Loading takes three
//! steps: read the header, check everything, read the numbers into new state. Only then, and
//! without anything that could fail, the caller puts it in place.

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
mod wrapper;
