use pulp::NullaryFnOnce;

/// Runs `body` compiled for the best vector unit of this CPU (AVX-512, AVX2, NEON, ...).
///
/// `body` is ordinary code with a fixed number of lanes that the compiler vectorises, so the bits
/// do not depend on what is found; no operation here is ever contracted into a fused one. It is a
/// type whose `call` is `#[inline(always)]`, as a closure of some size would not be inlined, and
/// so be compiled for the baseline CPU.
#[inline]
pub(crate) fn dispatch<F: NullaryFnOnce>(body: F) -> F::Output {
    pulp::Arch::new().dispatch(body)
}

/// As [`dispatch`], but with vectors of at most 256 bits, for loops that divide and take roots:
/// dividers are no wider than that, and on some CPUs (AMD Zen 4) take longer for one vector of 512
/// bits than for two of 256.
#[inline]
pub(crate) fn dispatch_256<F: NullaryFnOnce>(body: F) -> F::Output {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return simd.vectorize(body);
    }
    dispatch(body)
}

/// Whether [`dispatch`] compiles `mul_add` to one instruction, rather than to a slow call.
#[inline]
pub(crate) fn has_fma() -> bool {
    cfg!(any(
        target_arch = "x86",
        target_arch = "x86_64",
        target_arch = "aarch64"
    )) && !matches!(pulp::Arch::new(), pulp::Arch::Scalar)
}
