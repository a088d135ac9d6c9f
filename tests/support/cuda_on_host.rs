//! The stand-in for the CUDA driver of `ci/cuda-on-host`: what reached it, and how to make it fail.

use std::ffi::{CStr, c_char};
use std::sync::{Mutex, MutexGuard, PoisonError};

unsafe extern "C" {
    fn cuda_on_host_count(what: *const c_char) -> u64;
    fn cuda_on_host_fail_launches(kernel: *const c_char);
    safe fn cuda_on_host_reset_counts();
    safe fn cuda_on_host_fail_allocations_after(n: u64);
    safe fn cuda_on_host_seed(seed: u64);
}

static ALONE: Mutex<()> = Mutex::new(());

/// The driver for one test alone, with all counts at zero; failures end when it is dropped.
#[derive(Debug)]
pub struct Driver(#[allow(dead_code)] MutexGuard<'static, ()>);

impl Driver {
    /// Waits until no other test has it.
    #[must_use]
    pub fn lock() -> Self {
        let driver = Self(ALONE.lock().unwrap_or_else(PoisonError::into_inner));
        driver.reset_counts();
        driver
    }

    /// How often since the last reset: `launches`, `synchronizations`, `allocations`,
    /// `htod_copies`, `htod_bytes` (`dtoh` and `dtod` likewise), or launches of a kernel by its
    /// name. `live_bytes` is now.
    #[must_use]
    pub fn count(&self, what: &CStr) -> u64 {
        // SAFETY: a C string, which the function only reads.
        unsafe { cuda_on_host_count(what.as_ptr()) }
    }

    /// Sets all counts to zero.
    pub fn reset_counts(&self) {
        cuda_on_host_reset_counts();
    }

    /// After `n` more allocations, device memory is at its end.
    pub fn fail_allocations_after(&self, n: u64) {
        cuda_on_host_fail_allocations_after(n);
    }

    /// Launches of this kernel fail.
    pub fn fail_launches(&self, kernel: &CStr) {
        // SAFETY: a C string, which the function copies.
        unsafe { cuda_on_host_fail_launches(kernel.as_ptr()) }
    }

    /// Nothing fails any more.
    pub fn stop_failing(&self) {
        cuda_on_host_fail_allocations_after(u64::MAX);
        // SAFETY: null is its word for none.
        unsafe { cuda_on_host_fail_launches(std::ptr::null()) }
    }

    /// Takes another order of blocks and threads.
    pub fn seed(&self, seed: u64) {
        cuda_on_host_seed(seed);
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.stop_failing();
    }
}
