//! What the program can do, a command a file.

pub mod compare;
pub mod find_max_norm;
pub mod story;
pub mod study;
pub mod sweep;
pub mod train;
