//! How many threads everyone has.

use anyhow::Result;
use rayon::ThreadPoolBuilder;

/// How many threads every rival has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Threads(usize);

impl Threads {
    /// Starts rayon's pool, which the library, candle and the floor share.
    pub(crate) fn start(threads: Option<usize>) -> Result<Self> {
        ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .build_global()?;
        Ok(Self(rayon::current_num_threads()))
    }

    pub(crate) fn count(self) -> usize {
        self.0
    }
}
