use pulp::NullaryFnOnce;

/// Runs `body` compiled for the widest vector instructions of this CPU (AVX-512, AVX2, NEON, ...).
///
/// `body` is ordinary code with a fixed number of lanes that the compiler vectorises, and the
/// compiler never contracts operations into a fused one. So the bits do not depend on the CPU.
/// `body` is a type whose `call` is `#[inline(always)]`: a large closure would not be inlined, and
/// would be compiled for the baseline CPU.
#[inline]
pub(crate) fn dispatch<F: NullaryFnOnce>(body: F) -> F::Output {
    pulp::Arch::new().dispatch(body)
}

/// As [`dispatch`], but with vectors of at most 256 bits, for loops with divisions and roots.
/// Dividers are at most that wide, and some CPUs (AMD Zen 4) take longer for one 512-bit vector
/// than for two 256-bit ones.
#[inline]
pub(crate) fn dispatch_256<F: NullaryFnOnce>(body: F) -> F::Output {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return simd.vectorize(body);
    }
    dispatch(body)
}

/// Whether [`dispatch`] compiles `mul_add` to one instruction rather than a slow call.
#[inline]
pub(crate) fn has_fma() -> bool {
    cfg!(any(
        target_arch = "x86",
        target_arch = "x86_64",
        target_arch = "aarch64"
    )) && !matches!(pulp::Arch::new(), pulp::Arch::Scalar)
}

/// Whether [`dispatch`] has vectors of 512 bits.
#[inline]
pub(crate) fn has_512_bits() -> bool {
    #[cfg(target_arch = "x86_64")]
    if pulp::x86::V4::try_new().is_some() {
        return true;
    }
    false
}
