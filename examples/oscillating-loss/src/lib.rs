//! A weighted power loss on real weather, trained with and without gradient clipping.
//!
//! `cargo run --release -p oscillating-loss` answers: my loss oscillates; does clipping help, how,
//! and with which limit?

#![deny(unsafe_code)]

pub mod arm;
pub mod arms;
pub mod baseline;
pub mod checkpoint;
pub mod cli;
pub mod commands;
pub mod conclusion;
pub mod data;
pub mod events;
pub mod experiment;
pub mod figures;
pub mod given;
pub mod histogram;
pub mod init;
pub mod interrupt;
pub mod late;
pub mod metrics;
pub mod model;
pub mod ours;
pub mod out_dir;
pub mod outcome;
pub mod parallel;
pub mod param_norms;
pub mod progress;
pub mod run;
pub mod score;
pub mod settings;
pub mod source;
pub mod study_table;
pub mod summary;
pub mod table;
pub mod tensorboard;
pub mod train;
