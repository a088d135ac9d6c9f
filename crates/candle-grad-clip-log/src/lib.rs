//! What a training run leaves behind, for any candle training loop: numbers as CSV, events for
//! `TensorBoard`, and a page that opens offline and says whether the run learns, is stable, and
//! which limit would suit it.
//!
//! ```
//! # use candle_core::{Device, Var};
//! # use candle_grad_clip::{Clip, ClippedOptimizer};
//! # use candle_nn::{Optimizer, SGD};
//! use candle_grad_clip_log::RunLog;
//!
//! # let temporary = tempfile::tempdir()?;
//! # let folder = temporary.path().join("runs/mine");
//! # let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
//! # let vars = vec![("w".to_string(), w.clone())];
//! # let sgd = SGD::new(vec![w.clone()], 0.1)?;
//! let mut opt = ClippedOptimizer::wrap(sgd, vars, Clip::norm(1.0))?.with_param_norms(true);
//! let mut log = RunLog::create(&folder)?; // for example "runs/mine"
//! log.describe(&opt)?; // optional, as all but step: names and shapes of the Vars, the limit
//! log.config(&("seed", 42))?;
//! log.total_steps(100);
//! for step in 1..=100 {
//!     let loss = w.sqr()?.sum_all()?;
//!     let report = opt.backward_step_report(&loss)?;
//!     log.step(&report, loss.to_scalar::<f64>()?)?;
//!     if step % 50 == 0 {
//!         log.scalar("loss/test", step, 0.5)?;
//!     }
//! }
//! log.finish()?; // now open index.html
//! assert!(folder.join("index.html").is_file());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The files
//! - `index.html`: the page of the run. While the run goes on, it is written anew now and then, and
//!   reloads itself.
//! - `metrics.csv`: a row for each step, [`MetricsRow`]. `scalars.csv`: the values of
//!   [`RunLog::scalar`], [`ScalarRow`]. Read them with [`read_metrics`] and [`read_scalars`].
//! - `param_norms.csv`: the norms by Var, [`ParamNormsRow`], if the optimizer measures them
//!   ([`with_param_norms`](candle_grad_clip::ClippedOptimizer::with_param_norms)). Its size is
//!   bounded: 10^5 steps take about 1,100 rows a Var.
//! - `events.out.tfevents.*`: for `TensorBoard`. `run.json`: what was run.
//!
//! Files are flushed every two seconds, and by [`RunLog::flush`]. A process may be killed at any
//! time: the files open, and [`RunLog::resume`] cuts half a record off. They are not synced to the
//! disk, so a power cut may cost more.
//!
//! Call [`RunLog::flush`] before you save a checkpoint, and [`RunLog::resume`] with its step after
//! you have loaded it: then no step is missing from the log, and none is in it twice.
//!
//! # Several runs
//! [`compare_runs`] lays the runs of a folder over each other, in an `index.html` above theirs.
//! `RunLog` does not write outside its own folder, so call it when the runs are done.

#![deny(unsafe_code)]

// Other versions under the name that candle 0.11 has by itself.
#[cfg(feature = "candle-0_10")]
extern crate candle_core_0_10 as candle_core;
#[cfg(feature = "candle-0_9")]
extern crate candle_core_0_9 as candle_core;
#[cfg(feature = "candle-0_10")]
extern crate candle_nn_0_10 as candle_nn;
#[cfg(feature = "candle-0_9")]
extern crate candle_nn_0_9 as candle_nn;

mod compare;
mod csv_file;
mod error;
mod files;
mod folder;
mod histogram;
mod history;
mod listing;
mod number;
pub mod page;
mod param_norms;
mod progress;
mod rows;
mod run_info;
mod run_log;
mod run_page;
mod tensorboard;

pub use compare::{compare_runs, runs_sections};
pub use error::{Error, Result};
pub use progress::Progress;
pub use rows::{
    MetricsRow, ParamNormsRow, ScalarRow, read_metrics, read_param_norms, read_scalars,
};
pub use run_log::RunLog;

/// Compiles the code of the README. Here, since its code and the guide's use this crate too.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

/// Compiles the code of the guide.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/guide.md")]
struct Guide;

/// Compiles the code of the page on migrating.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/migrating.md")]
struct Migrating;
