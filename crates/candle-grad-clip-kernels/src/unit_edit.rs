//! Multiplies each row or column of a matrix by a coefficient.

use pulp::NullaryFnOnce;

use crate::convert::Narrow;
use crate::edit::{AsIs, Finite, Scale, coef_factors, is_tiny};
use crate::element::Element;
use crate::simd::dispatch;
use crate::units::Units;
use crate::wide::Wide;

/// Elements per widening step, into a stack buffer.
const CHUNK: usize = 1024;

/// One coefficient per unit. Every element is multiplied by the coefficient of its unit, as in
/// [`Edit::Scale`](crate::Edit::Scale).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UnitEdit<'a> {
    /// How the matrix is divided into units.
    pub units: Units,
    /// One coefficient per unit.
    pub coefs: &'a [f64],
    /// Whether NaN and infinite elements become 0.
    pub zero_non_finite: bool,
}

impl UnitEdit<'_> {
    /// Edits a run of elements whose first has the index `start`.
    pub(crate) fn edit<E: Element>(&self, start: usize, values: &mut [E]) {
        match self.units {
            Units::Rows(_) => dispatch(EditRows {
                edit: self,
                start,
                values,
            }),
            Units::Columns(_) => {
                let mut at = start;
                let mut wide = [E::Wide::default(); CHUNK];
                for values in values.chunks_mut(CHUNK) {
                    let wide = &mut wide[..values.len()];
                    self.widen(at, values, wide);
                    dispatch(Narrow(&*wide, &mut *values));
                    at += values.len();
                }
            }
        }
    }

    /// As `edit`, but writes to `target`.
    pub(crate) fn edit_into<E: Element>(&self, start: usize, source: &[E], target: &mut [E]) {
        let mut at = start;
        let mut wide = [E::Wide::default(); CHUNK];
        for (source, target) in source.chunks(CHUNK).zip(target.chunks_mut(CHUNK)) {
            let wide = &mut wide[..source.len()];
            self.widen(at, source, wide);
            dispatch(Narrow(&*wide, target));
            at += source.len();
        }
    }

    /// As `edit_into`, but without rounding.
    pub(crate) fn widen<E: Element>(&self, start: usize, source: &[E], target: &mut [E::Wide]) {
        dispatch(WidenUnits {
            edit: self,
            start,
            source,
            target,
        });
    }
}

/// Splits a run of `len` elements from `start` by rows. Yields for each part its row, and its start
/// and end in the run.
#[inline(always)]
fn parts(start: usize, len: usize, row: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    // One division in total, not one per row.
    let (mut at, mut left) = if len == 0 {
        (0, 0)
    } else {
        (start / row, row - start % row)
    };
    let mut begin = 0;
    std::iter::from_fn(move || {
        if begin == len {
            return None;
        }
        let part = (at, begin, len.min(begin + left));
        (at, left, begin) = (at + 1, row, part.2);
        Some(part)
    })
}

struct EditRows<'a, E> {
    edit: &'a UnitEdit<'a>,
    start: usize,
    values: &'a mut [E],
}

impl<E: Element> NullaryFnOnce for EditRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            edit,
            start,
            values,
        } = self;
        for (row, begin, end) in parts(start, values.len(), edit.units.row()) {
            let (part, coef) = (&mut values[begin..end], edit.coefs[row]);
            if edit.zero_non_finite {
                E::map(part, Finite(Scale::new(coef)));
            } else if coef != 1.0 {
                E::map(part, Scale::new(coef));
            }
        }
    }
}

struct WidenUnits<'a, E: Element> {
    edit: &'a UnitEdit<'a>,
    start: usize,
    source: &'a [E],
    target: &'a mut [E::Wide],
}

impl<E: Element> NullaryFnOnce for WidenUnits<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            edit,
            start,
            source,
            target,
        } = self;
        if edit.zero_non_finite {
            E::widen(source, target, Finite(AsIs));
        } else {
            E::widen(source, target, AsIs);
        }
        let row_length = edit.units.row();
        let mut column = if target.is_empty() {
            0
        } else {
            start % row_length
        };
        for (row, begin, end) in parts(start, target.len(), row_length) {
            let part = &mut target[begin..end];
            match edit.units {
                Units::Rows(_) => scale_all(part, edit.coefs[row]),
                Units::Columns(_) => scale_each(part, &edit.coefs[column..]),
            }
            column = 0;
        }
    }
}

/// Whether a coefficient needs two factors; never for f64.
#[inline(always)]
fn has_two_factors<W: Wide>(coef: f64) -> bool {
    size_of::<W>() < size_of::<f64>() && is_tiny(coef)
}

#[inline(always)]
fn scale_all<W: Wide>(values: &mut [W], coef: f64) {
    let factors = if has_two_factors::<W>(coef) {
        coef_factors(coef)
    } else {
        [coef, 1.0]
    };
    let [factor, rest] = factors.map(W::from_f64);
    for x in values {
        *x = *x * factor * rest;
    }
}

#[inline(always)]
fn scale_each<W: Wide>(values: &mut [W], coefs: &[f64]) {
    let coefs = &coefs[..values.len()];
    // Checks all coefficients without a branch, so that both loops vectorise.
    let has_tiny = coefs
        .iter()
        .fold(false, |any, coef| any | has_two_factors::<W>(*coef));
    if has_tiny {
        for (x, coef) in values.iter_mut().zip(coefs) {
            scale_all(std::slice::from_mut(x), *coef);
        }
        return;
    }
    for (x, coef) in values.iter_mut().zip(coefs) {
        *x = *x * W::from_f64(*coef);
    }
}
