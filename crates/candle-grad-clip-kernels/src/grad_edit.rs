//! Edits a whole gradient: all elements equally, or by units.

use pulp::NullaryFnOnce;
use rayon::prelude::*;

use crate::block::BLOCK;
use crate::edit::{Edit, specialise};
use crate::element::{Element, ElementEdit};
use crate::simd::dispatch;
use crate::unit_edit::UnitEdit;

/// The edit of a gradient: the same for every element, or the same for every element of a unit.
///
/// ```
/// use candle_grad_clip_kernels::{UnitEdit, Units, edit};
///
/// let mut matrix = [1f32, 2.0, 3.0, 4.0];
/// let halve_second_row = UnitEdit { units: Units::Rows(2), coefs: &[1.0, 0.5], zero_non_finite: false };
/// edit(&mut matrix, halve_second_row);
/// assert_eq!(matrix, [1.0, 2.0, 1.5, 2.0]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GradEdit<'a> {
    /// The same for every element.
    All(Edit),
    /// A coefficient for each unit.
    Units(UnitEdit<'a>),
}

impl From<Edit> for GradEdit<'_> {
    fn from(edit: Edit) -> Self {
        Self::All(edit)
    }
}

impl<'a> From<UnitEdit<'a>> for GradEdit<'a> {
    fn from(edit: UnitEdit<'a>) -> Self {
        Self::Units(edit)
    }
}

/// Edits `values` in place. Parallel for more than one [`BLOCK`].
///
/// ```
/// use candle_grad_clip_kernels::{Edit, edit};
///
/// let mut values = [3f32, -4.0, f32::NAN];
/// edit(&mut values, Edit::Clamp { clip_value: 1.0, clip_coef: 1.0, zero_non_finite: true });
/// assert_eq!(values, [1.0, -1.0, 0.0]);
/// ```
pub fn edit<'a, E: Element>(values: &mut [E], edit: impl Into<GradEdit<'a>>) {
    let edit = edit.into();
    if values.len() <= BLOCK {
        edit_block(0, values, edit);
    } else {
        let blocks = values.par_chunks_mut(BLOCK).enumerate();
        blocks.for_each(|(i, block)| edit_block(i * BLOCK, block, edit));
    }
}

/// Writes the edited `source` to `target`. Parallel for more than one [`BLOCK`].
///
/// ```
/// use candle_grad_clip_kernels::{Edit, edit_into};
///
/// let mut target = [0.0; 2];
/// edit_into(&[3f64, 4.0], &mut target, Edit::Scale { clip_coef: 0.5, zero_non_finite: false });
/// assert_eq!(target, [1.5, 2.0]);
/// ```
///
/// # Panics
/// If the lengths differ.
pub fn edit_into<'a, E: Element>(source: &[E], target: &mut [E], edit: impl Into<GradEdit<'a>>) {
    let edit = edit.into();
    assert_eq!(
        source.len(),
        target.len(),
        "source and target differ in length"
    );
    if source.len() <= BLOCK {
        edit_block_into(0, source, target, edit);
    } else {
        source
            .par_chunks(BLOCK)
            .zip(target.par_chunks_mut(BLOCK))
            .enumerate()
            .for_each(|(i, (source, target))| edit_block_into(i * BLOCK, source, target, edit));
    }
}

struct EditInPlace<'a, E, F>(&'a mut [E], F);

impl<E: Element, F: ElementEdit> NullaryFnOnce for EditInPlace<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        E::map(self.0, self.1);
    }
}

struct EditInto<'a, E, F>(&'a [E], &'a mut [E], F);

impl<E: Element, F: ElementEdit> NullaryFnOnce for EditInto<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        E::map_into(self.0, self.1, self.2);
    }
}

/// Edits a block whose first element has the index `start`.
fn edit_block<E: Element>(start: usize, values: &mut [E], edit: GradEdit<'_>) {
    match edit {
        GradEdit::All(edit) => specialise!(edit, op => dispatch(EditInPlace(values, op))),
        GradEdit::Units(edit) => edit.edit(start, values),
    }
}

fn edit_block_into<E: Element>(start: usize, source: &[E], target: &mut [E], edit: GradEdit<'_>) {
    match edit {
        GradEdit::All(edit) => specialise!(edit, op => dispatch(EditInto(source, target, op))),
        GradEdit::Units(edit) => edit.edit_into(start, source, target),
    }
}
