//! Conversion between a dtype and its compute dtype, as bodies for
//! [`dispatch`](crate::simd::dispatch).

use pulp::NullaryFnOnce;

use crate::element::{Element, ElementEdit};

/// Widens and edits.
pub(crate) struct Widen<'a, E: Element, F>(
    pub(crate) &'a [E],
    pub(crate) &'a mut [E::Wide],
    pub(crate) F,
);

impl<E: Element, F: ElementEdit> NullaryFnOnce for Widen<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        E::widen(self.0, self.1, self.2);
    }
}

/// Rounds.
pub(crate) struct Narrow<'a, E: Element>(pub(crate) &'a [E::Wide], pub(crate) &'a mut [E]);

impl<E: Element> NullaryFnOnce for Narrow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        E::narrow(self.0, self.1);
    }
}
