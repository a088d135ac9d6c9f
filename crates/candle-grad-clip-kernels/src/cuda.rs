//! The CUDA kernels of `cuda/*.cu` as PTX for compute capability 7.5. On first use the driver
//! compiles them for its GPU, of this or a later capability.
#![allow(missing_docs)] // the build script writes one constant per file: EDIT, FOLD, MEASURE, UPDATE

include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
