//! The CUDA kernels of `cuda/*.cu` as PTX for compute capability 7.5, which the driver compiles for
//! its GPU, of that or of any later capability, at first use.
#![allow(missing_docs)] // the build script writes a constant a file: EDIT, FOLD, MEASURE, UPDATE

include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
