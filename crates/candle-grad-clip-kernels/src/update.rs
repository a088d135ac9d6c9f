use pulp::NullaryFnOnce;

use crate::block::BLOCK;
use crate::convert::{Narrow, Widen};
use crate::edit::{AsIs, specialise};
use crate::element::Element;
use crate::grad_edit::GradEdit;
use crate::simd::{dispatch, dispatch_256};
use crate::wide::Wide;

/// Elements per widening and editing step, into a stack buffer that stays in the cache.
const CHUNK: usize = 1024;

/// The maximum number of moment arrays of an [`UpdateRule`].
pub const MAX_MOMENTS: usize = 3;

/// The equations of one optimizer step: [`AdamW`](crate::AdamW) or [`Sgd`](crate::Sgd).
///
/// All slices have the same length; unused moments are empty.
pub trait UpdateRule: Copy + Send + Sync {
    /// The numbers of the step, rounded to the compute dtype.
    type Numbers<W: Wide>: Copy + Send + Sync;
    /// Computes the numbers of the step, once for all elements.
    fn numbers<W: Wide>(&self) -> Self::Numbers<W>;
    /// Updates the parameters and moments.
    fn update<W: Wide>(
        numbers: &Self::Numbers<W>,
        params: &mut [W],
        grads: &[W],
        moments: [&mut [W]; MAX_MOMENTS],
    );
}

/// A parameter, its gradient, and its optimizer state.
///
/// All slices have the same length; unused moments and an unused `master` are empty.
#[derive(Debug)]
pub struct Update<'a, E: Element> {
    /// The parameter's values.
    pub params: &'a mut [E],
    /// The gradient, read only.
    pub grads: &'a [E],
    /// The moment arrays.
    pub moments: [&'a mut [E::Wide]; MAX_MOMENTS],
    /// The parameter in full precision, whose rounded copy is `params`; empty if not used. An
    /// element that does not round to its element of `params` (because the caller has set the
    /// parameter) is set to that element before the step.
    pub master: &'a mut [E::Wide],
}

impl<E: Element> Update<'_, E> {
    /// Splits into the first `mid` elements and the others.
    fn split_at(self, mid: usize) -> (Self, Self) {
        let (params, params_rest) = self.params.split_at_mut(mid);
        let (grads, grads_rest) = self.grads.split_at(mid);
        let (master, master_rest) = split(self.master, mid);
        let [(a, a_rest), (b, b_rest), (c, c_rest)] = self.moments.map(|m| split(m, mid));
        let first = Update {
            params,
            grads,
            moments: [a, b, c],
            master,
        };
        let rest = Update {
            params: params_rest,
            grads: grads_rest,
            moments: [a_rest, b_rest, c_rest],
            master: master_rest,
        };
        (first, rest)
    }

    fn check(&self) {
        let len = self.params.len();
        let fits = |other: usize| other == 0 || other == len;
        assert!(
            self.grads.len() == len
                && fits(self.master.len())
                && self.moments.iter().all(|m| fits(m.len())),
            "parameter, gradient and state differ in length"
        );
    }
}

/// Splits a used slice; an empty slice gives two empty ones.
fn split<W>(values: &mut [W], mid: usize) -> (&mut [W], &mut [W]) {
    let mid = mid.min(values.len());
    values.split_at_mut(mid)
}

/// Takes a step of `rule` with the edited gradient. It reads the gradient once, does not write it,
/// and allocates nothing. Parallel for more than one [`BLOCK`].
///
/// f64 is computed in f64, the other dtypes in f32. Half-precision values are widened and the
/// result is rounded once; the edited gradient is not rounded in between. No multiply-add is fused,
/// so the bits on every machine are those of the equations with one operation at a time.
///
/// ```
/// use candle_grad_clip_kernels::{Edit, Sgd, Update, update};
///
/// let mut params = [1f32, 2.0];
/// let whole = Update { params: &mut params, grads: &[3.0, 4.0], moments: Default::default(), master: &mut [] };
/// let sgd = Sgd { lr: 0.5, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false, is_first: true };
/// update(whole, Edit::Clamp { clip_value: 1.0, clip_coef: 1.0, zero_non_finite: false }, &sgd);
/// assert_eq!(params, [0.5, 1.5]);
/// ```
///
/// # Panics
/// If the slices differ in length.
pub fn update<'a, E: Element, R: UpdateRule>(
    update: Update<'_, E>,
    edit: impl Into<GradEdit<'a>>,
    rule: &R,
) {
    update.check();
    run::<E, R>(0, update, edit.into(), &rule.numbers());
}

fn run<E: Element, R: UpdateRule>(
    start: usize,
    update: Update<'_, E>,
    edit: GradEdit<'_>,
    numbers: &R::Numbers<E::Wide>,
) {
    let len = update.params.len();
    if len <= BLOCK {
        return block::<E, R>(start, update, edit, numbers);
    }
    let mid = (len / 2).next_multiple_of(BLOCK);
    let (first, rest) = update.split_at(mid);
    rayon::join(
        || run::<E, R>(start, first, edit, numbers),
        || run::<E, R>(start + mid, rest, edit, numbers),
    );
}

/// Updates a block whose first element has the index `start`.
fn block<E: Element, R: UpdateRule>(
    mut start: usize,
    mut rest: Update<'_, E>,
    edit: GradEdit<'_>,
    numbers: &R::Numbers<E::Wide>,
) {
    let (mut grads, mut wide) = ([E::Wide::default(); CHUNK], [E::Wide::default(); CHUNK]);
    while !rest.params.is_empty() {
        let len = CHUNK.min(rest.params.len());
        let (chunk, others) = rest.split_at(len);
        rest = others;
        let grads = &mut grads[..len];
        match edit {
            GradEdit::All(edit) => {
                specialise!(edit, op => dispatch(Widen(chunk.grads, &mut *grads, op)));
            }
            GradEdit::Units(edit) => edit.widen(start, chunk.grads, grads),
        }
        start += len;
        if !chunk.master.is_empty() {
            dispatch(Renew(&*chunk.params, &mut *chunk.master));
            dispatch_256(Apply::<_, R>(
                numbers,
                &mut *chunk.master,
                grads,
                chunk.moments,
            ));
            dispatch(Narrow(&*chunk.master, chunk.params));
        } else if let Some(params) = E::as_wide(chunk.params) {
            dispatch_256(Apply::<_, R>(numbers, params, grads, chunk.moments));
        } else {
            let wide = &mut wide[..len];
            dispatch(Widen(&*chunk.params, &mut *wide, AsIs));
            dispatch_256(Apply::<_, R>(numbers, &mut *wide, grads, chunk.moments));
            dispatch(Narrow(&*wide, chunk.params));
        }
    }
}

/// Adopts parameters that the caller has set into the master.
struct Renew<'a, E: Element>(&'a [E], &'a mut [E::Wide]);

impl<E: Element> NullaryFnOnce for Renew<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        E::renew(self.0, self.1);
    }
}

struct Apply<'a, W: Wide, R: UpdateRule>(
    &'a R::Numbers<W>,
    &'a mut [W],
    &'a [W],
    [&'a mut [W]; MAX_MOMENTS],
);

impl<W: Wide, R: UpdateRule> NullaryFnOnce for Apply<'_, W, R> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        R::update(self.0, self.1, self.2, self.3);
    }
}
