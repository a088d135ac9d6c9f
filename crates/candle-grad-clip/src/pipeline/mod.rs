//! The verbs that touch tensors: collect and measure (one walk), and edit.

pub(crate) mod collect;
pub(crate) mod edit;
pub(crate) mod measure;
pub(crate) mod units;
