//! A weighted power loss on real weather, trained with and without gradient clipping.
//!
//! `cargo run --release -p oscillating-loss` answers: my loss oscillates; does clipping help, how,
//! and with which limit?

#![deny(unsafe_code)]

pub mod arm;
pub mod arms;
pub mod baseline;
pub mod cli;
pub mod commands;
pub mod conclusion;
pub mod data;
pub mod experiment;
pub mod init;
pub mod interrupt;
pub mod metrics;
pub mod model;
pub mod out_dir;
pub mod outcome;
pub mod pages;
pub mod parallel;
pub mod run;
pub mod saves;
pub mod score;
pub mod settings;
pub mod source;
pub mod standing;
pub mod tables;
pub mod train;
