//! candle's tensor operations only, and of those only what every device has.
//!
//! Each Var's numbers stay on its device until all are known; then one read brings them to the
//! host, where they are added in f64. No comparison on the device decides whether an element is
//! finite, since each device treats NaN in another way, and Metal by default as if there were none:
//! see `powers`. What is not finite is brought to CPU, and measured and edited there. So `clamp`,
//! `minimum` and the maximum only see finite elements.

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
