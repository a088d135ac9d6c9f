/// Runs `body` compiled for the best vector unit of this CPU (AVX-512, AVX2, NEON, ...).
///
/// `body` is ordinary code with a fixed number of lanes that the compiler vectorises, so the bits
/// do not depend on what is found; no operation here is ever contracted into a fused one.
#[inline]
pub(crate) fn dispatch<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}
