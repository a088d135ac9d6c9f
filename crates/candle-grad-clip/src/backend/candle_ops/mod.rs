//! The backend that uses candle's tensor operations only, and only those that every device
//! supports.
//!
//! The sums of each Var stay on its device until all are computed. One read then brings them to the
//! host, which adds them in f64.
//!
//! No comparison on the device decides whether an element is finite: each device treats NaN
//! differently, and Metal's fast math assumes that there is none (see `powers`). Tensors with
//! non-finite elements are copied to CPU, and measured and edited there. So `clamp`, `minimum` and
//! the maximum only see finite elements.

mod edit;
mod measure;
mod powers;
mod step;
mod tensor_ops;
mod units;

pub(crate) use edit::{accumulate, edit, round};
pub(crate) use measure::measure;
pub(crate) use step::{Stepped, step};
pub(crate) use units::measure_units;
