//! The stages that access tensors: collect and measure (one pass), and edit.

pub(crate) mod collect;
pub(crate) mod edit;
pub(crate) mod measure;
pub(crate) mod units;
