//! Units of a gradient, the rows or the columns of a matrix: each is measured, and scaled, by itself.

use pulp::NullaryFnOnce;
use rayon::prelude::*;

use crate::edit::{AsIs, Finite, Scale};
use crate::simd::dispatch;
use crate::{BLOCK, Edit, Element, NormType, Stats, Wide, measure};

/// Columns that one task measures: a cache line of f32.
const COLUMNS: usize = 16;
/// Rows of which a column is gathered at once.
const ROWS: usize = 1024;
/// Elements that are widened at once, into a buffer on the stack.
const CHUNK: usize = 1024;

/// How the elements of a matrix, row after row, make units.
///
/// ```
/// use candle_grad_clip_kernels::Units;
///
/// assert_eq!(Units::Rows(3).count(6), 2); // two rows of three elements
/// assert_eq!(Units::Columns(3).count(6), 3);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Units {
    /// Each row is one; rows have this many elements.
    Rows(usize),
    /// Each column is one; there are this many.
    Columns(usize),
}

impl Units {
    /// How many units so many elements make.
    #[must_use]
    pub fn count(self, elements: usize) -> usize {
        match self {
            Self::Rows(length) => elements.checked_div(length).unwrap_or(0),
            Self::Columns(columns) => columns,
        }
    }

    /// The length of a row.
    fn row(self) -> usize {
        match self {
            Self::Rows(length) | Self::Columns(length) => length,
        }
    }
}

/// Measures each unit, as [`measure`](fn@measure) does a slice, into `stats`, of which there is one a unit. Parallel
/// for more than one [`BLOCK`].
///
/// ```
/// use candle_grad_clip_kernels::{NormType, Stats, Units, measure_units};
///
/// let matrix = [3f32, 1.0, 4.0, 1.0]; // (3, 1) and (4, 1)
/// let mut stats = [Stats::ZERO; 2];
/// measure_units(&matrix, Units::Columns(2), NormType::L2, &mut stats);
/// assert_eq!(stats[0].power.root(NormType::L2).value(), 5.0);
/// measure_units(&matrix, Units::Rows(2), NormType::L1, &mut stats);
/// assert_eq!(stats[0].power.root(NormType::L1).value(), 4.0);
/// ```
///
/// # Panics
/// If there are not as many `stats` as units, or the last row is not whole.
pub fn measure_units<E: Element>(
    values: &[E],
    units: Units,
    norm_type: NormType,
    stats: &mut [Stats],
) {
    let row = units.row();
    assert!(
        units.count(values.len()) == stats.len() && (row == 0 || values.len().is_multiple_of(row)),
        "{} elements and {} stats do not fit {units:?}",
        values.len(),
        stats.len()
    );
    if values.is_empty() {
        return stats.fill(Stats::ZERO);
    }
    let of_rows = |(rows, stats): (&[E], &mut [Stats])| {
        for (row, stats) in rows.chunks_exact(row).zip(stats) {
            *stats = measure(row, norm_type);
        }
    };
    let of_columns = |(group, stats): (usize, &mut [Stats])| {
        measure_columns(values, row, group * COLUMNS, norm_type, stats);
    };
    let is_small = values.len() <= BLOCK;
    match units {
        Units::Rows(_) if is_small => of_rows((values, stats)),
        Units::Rows(_) => {
            let rows = (BLOCK / row).max(1);
            let tasks = values.par_chunks(rows * row);
            tasks.zip(stats.par_chunks_mut(rows)).for_each(of_rows);
        }
        Units::Columns(_) if is_small => {
            let groups = stats.chunks_mut(COLUMNS).enumerate();
            groups.for_each(of_columns);
        }
        Units::Columns(_) => {
            let groups = stats.par_chunks_mut(COLUMNS).enumerate();
            groups.for_each(of_columns);
        }
    }
}

/// Measures the columns from `first` on: gathers some rows of one, which the next finds in the cache.
fn measure_columns<E: Element>(
    values: &[E],
    columns: usize,
    first: usize,
    norm_type: NormType,
    stats: &mut [Stats],
) {
    stats.fill(Stats::ZERO);
    let mut column = Vec::with_capacity(ROWS.min(values.len() / columns));
    for rows in values.chunks(ROWS * columns) {
        for (index, stats) in stats.iter_mut().enumerate() {
            column.clear();
            column.extend(rows[first + index..].iter().step_by(columns).copied());
            *stats = stats.merge(measure(&column, norm_type), norm_type);
        }
    }
}

/// A coefficient for each unit: every element times that of its unit, as [`Edit::Scale`] multiplies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UnitEdit<'a> {
    /// What the units are.
    pub units: Units,
    /// What to multiply by, one a unit.
    pub coefs: &'a [f64],
    /// Whether NaN and infinite elements become 0.
    pub zero_non_finite: bool,
}

/// What to do to a gradient: the same to every element, or to every element of a unit.
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
    /// To every element.
    All(Edit),
    /// To every element of a unit.
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

impl UnitEdit<'_> {
    /// Edits a run of elements that begins with the one at `start`.
    pub(crate) fn edit<E: Element>(&self, start: usize, values: &mut [E]) {
        match self.units {
            Units::Rows(_) => dispatch(EditRows(self, start, values)),
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

    /// The same, into `target`.
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

    /// The same, not rounded.
    pub(crate) fn widen<E: Element>(&self, start: usize, source: &[E], target: &mut [E::Wide]) {
        dispatch(WidenUnits(self, start, source, target));
    }
}

/// The parts of a run of `len` elements from `start` on that each lie in one row: the row, and where the part begins and
/// ends in the run.
#[inline(always)]
fn parts(start: usize, len: usize, row: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut begin = 0;
    std::iter::from_fn(move || {
        if begin == len {
            return None;
        }
        let at = start + begin;
        let end = len.min(begin + row - at % row);
        let part = (at / row, begin, end);
        begin = end;
        Some(part)
    })
}

struct EditRows<'a, E>(&'a UnitEdit<'a>, usize, &'a mut [E]);

impl<E: Element> NullaryFnOnce for EditRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self(edit, start, values) = self;
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

struct WidenUnits<'a, E: Element>(&'a UnitEdit<'a>, usize, &'a [E], &'a mut [E::Wide]);

impl<E: Element> NullaryFnOnce for WidenUnits<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self(edit, start, source, target) = self;
        if edit.zero_non_finite {
            E::widen(source, target, Finite(AsIs));
        } else {
            E::widen(source, target, AsIs);
        }
        let row_length = edit.units.row();
        for (row, begin, end) in parts(start, target.len(), row_length) {
            let part = &mut target[begin..end];
            match edit.units {
                Units::Rows(_) => part
                    .iter_mut()
                    .for_each(|x| *x = times(*x, edit.coefs[row])),
                Units::Columns(_) => {
                    let column = (start + begin) % row_length;
                    for (x, coef) in part.iter_mut().zip(&edit.coefs[column..]) {
                        *x = times(*x, *coef);
                    }
                }
            }
        }
    }
}

/// A coefficient that f32 does not hold is two factors, as in [`Edit::Scale`].
#[inline(always)]
fn times<W: Wide>(x: W, coef: f64) -> W {
    let is_narrow = size_of::<W>() < size_of::<f64>();
    if is_narrow && coef != 0.0 && coef < f64::from(f32::MIN_POSITIVE) {
        let root = W::from_f64(coef.sqrt());
        x * root * root
    } else {
        x * W::from_f64(coef)
    }
}

struct Narrow<'a, E: Element>(&'a [E::Wide], &'a mut [E]);

impl<E: Element> NullaryFnOnce for Narrow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        E::narrow(self.0, self.1);
    }
}
