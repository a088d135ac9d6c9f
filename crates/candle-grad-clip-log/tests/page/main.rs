//! The pages: what is in the file, and what a browser makes of it.

#![allow(missing_docs, clippy::unwrap_used)]

mod browser;
mod demo;
mod file;
