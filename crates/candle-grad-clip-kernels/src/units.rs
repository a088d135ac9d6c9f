//! Units of a gradient, the rows or the columns of a matrix: each is measured, and scaled, by itself.

use pulp::NullaryFnOnce;
use rayon::prelude::*;

use crate::edit::{AsIs, Finite, Scale};
use crate::measure::SAFE_SUM;
use crate::simd::dispatch;
use crate::update::Narrow;
use crate::{BLOCK, Edit, Element, NormType, PartialPower, Stats, Wide, measure};

/// Columns that one task sums, row by row: their sums stay in the first cache.
const COLUMNS: usize = 512;
/// Rows that are summed before the sums are folded: keeps the rounding error of a long column small.
const ROWS: usize = 1024;
/// Rows up to this long are summed many at a call; calling for each would take longer than summing it.
const SHORT_ROW: usize = 256;
/// Lanes that a short row is summed in.
const LANES: usize = 4;
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
    match units {
        Units::Rows(_) => measure_rows(values, row, norm_type, stats),
        Units::Columns(1) => stats[0] = measure(values, norm_type),
        Units::Columns(_) => measure_columns(values, row, norm_type, stats),
    }
}

fn measure_rows<E: Element>(values: &[E], row: usize, norm_type: NormType, stats: &mut [Stats]) {
    let task = |(values, stats): (&[E], &mut [Stats])| {
        if row <= SHORT_ROW && Sum::of(norm_type).is_some() {
            dispatch(SumRows(values, row, norm_type, &mut *stats));
            for (values, stats) in values.chunks_exact(row).zip(stats) {
                // What a plain sum is not right for.
                if stats.nan > 0 {
                    *stats = measure(values, norm_type);
                }
            }
        } else {
            for (values, stats) in values.chunks_exact(row).zip(stats) {
                *stats = measure(values, norm_type);
            }
        }
    };
    if values.len() <= BLOCK {
        return task((values, stats));
    }
    let rows = (BLOCK / row).max(1);
    let tasks = values.par_chunks(rows * row);
    tasks.zip(stats.par_chunks_mut(rows)).for_each(task);
}

/// How the elements of a unit are added up without a scale.
#[derive(Clone, Copy)]
enum Sum {
    Abs,
    Squares,
    Largest,
}

impl Sum {
    fn of(norm_type: NormType) -> Option<Self> {
        match norm_type {
            NormType::L1 => Some(Self::Abs),
            NormType::L2 => Some(Self::Squares),
            NormType::Inf => Some(Self::Largest),
            NormType::P(_) => None,
        }
    }

    /// NaN once an element is.
    #[inline(always)]
    fn add(self, sum: f64, x: f64) -> f64 {
        match self {
            Self::Abs => sum + x.abs(),
            Self::Squares => sum + x * x,
            Self::Largest if sum >= x.abs() || sum.is_nan() => sum,
            Self::Largest => x.abs(),
        }
    }

    /// The stats of a finite unit; `None` where the sum does not tell.
    #[inline(always)]
    fn stats<E: Element>(self, sum: f64) -> Option<Stats> {
        let is_right = match self {
            Self::Largest => sum.is_finite(),
            // For 32 bits and less only an element that is not finite makes the sum so.
            _ => (E::EXACT_SQUARES && sum.is_finite()) || SAFE_SUM.contains(&sum),
        };
        let power = match self {
            Self::Largest if sum > 0.0 => PartialPower {
                scale: sum,
                sum: 1.0,
            },
            Self::Largest => PartialPower::ZERO,
            Self::Abs | Self::Squares => PartialPower { scale: 1.0, sum },
        };
        is_right.then_some(Stats {
            power,
            ..Stats::ZERO
        })
    }
}

/// A NaN, for [`Stats`] that are to be measured in another way.
const UNKNOWN: Stats = Stats {
    nan: 1,
    ..Stats::ZERO
};

struct SumRows<'a, E>(&'a [E], usize, NormType, &'a mut [Stats]);

impl<E: Element> NullaryFnOnce for SumRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self(values, row, norm_type, stats) = self;
        match Sum::of(norm_type) {
            Some(Sum::Abs) => sum_rows(values, row, Sum::Abs, stats),
            Some(Sum::Squares) => sum_rows(values, row, Sum::Squares, stats),
            Some(Sum::Largest) => sum_rows(values, row, Sum::Largest, stats),
            None => stats.fill(UNKNOWN),
        }
    }
}

#[inline(always)]
fn sum_rows<E: Element>(values: &[E], row: usize, how: Sum, stats: &mut [Stats]) {
    for (values, stats) in values.chunks_exact(row).zip(stats) {
        let mut lanes = [0.0; LANES];
        let (parts, rest) = values.as_chunks::<LANES>();
        for part in parts {
            for i in 0..LANES {
                lanes[i] = how.add(lanes[i], part[i].to_f64());
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane = how.add(*lane, x.to_f64());
        }
        let sum = fold(
            how,
            fold(how, lanes[0], lanes[1]),
            fold(how, lanes[2], lanes[3]),
        );
        *stats = how.stats::<E>(sum).unwrap_or(UNKNOWN);
    }
}

/// Two sums as one.
#[inline(always)]
fn fold(how: Sum, a: f64, b: f64) -> f64 {
    match how {
        Sum::Abs | Sum::Squares => a + b,
        Sum::Largest => how.add(a, b),
    }
}

fn measure_columns<E: Element>(
    values: &[E],
    columns: usize,
    norm_type: NormType,
    stats: &mut [Stats],
) {
    let task = |(at, stats): (usize, &mut [Stats])| {
        let first = at * COLUMNS;
        let Some(how) = Sum::of(norm_type) else {
            return gather_columns(values, columns, first, norm_type, stats);
        };
        let (mut sums, mut of_rows) = ([0.0; COLUMNS], [0.0; COLUMNS]);
        let sums = &mut sums[..stats.len()];
        let of_rows = &mut of_rows[..stats.len()];
        for rows in values.chunks(ROWS * columns) {
            of_rows.fill(0.0);
            dispatch(SumColumns(rows, columns, first, how, &mut *of_rows));
            for (sum, of_rows) in sums.iter_mut().zip(&*of_rows) {
                *sum = fold(how, *sum, *of_rows);
            }
        }
        for (at, (sum, stats)) in sums.iter().zip(stats).enumerate() {
            if let Some(found) = how.stats::<E>(*sum) {
                *stats = found;
            } else {
                let one = std::slice::from_mut(stats);
                gather_columns(values, columns, first + at, norm_type, one);
            }
        }
    };
    if values.len() <= BLOCK {
        stats.chunks_mut(COLUMNS).enumerate().for_each(task);
    } else {
        stats.par_chunks_mut(COLUMNS).enumerate().for_each(task);
    }
}

/// Adds to each sum the elements of its column, of some rows; the sums are those of the columns from `first` on.
struct SumColumns<'a, E>(&'a [E], usize, usize, Sum, &'a mut [f64]);

impl<E: Element> NullaryFnOnce for SumColumns<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self(rows, columns, first, how, sums) = self;
        for row in rows.chunks_exact(columns) {
            let row = &row[first..first + sums.len()];
            match how {
                Sum::Abs => add_row(row, Sum::Abs, sums),
                Sum::Squares => add_row(row, Sum::Squares, sums),
                Sum::Largest => add_row(row, Sum::Largest, sums),
            }
        }
    }
}

#[inline(always)]
fn add_row<E: Element>(row: &[E], how: Sum, sums: &mut [f64]) {
    for (sum, x) in sums.iter_mut().zip(row) {
        *sum = how.add(*sum, x.to_f64());
    }
}

/// The slow way, for columns that have no plain sum: from `first` on, each gathered and measured as a slice.
#[cold]
fn gather_columns<E: Element>(
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
    // One division, not one a row.
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

/// Whether f32 does not hold a coefficient: it is then two factors, as in [`Edit::Scale`].
#[inline(always)]
fn is_tiny<W: Wide>(coef: f64) -> bool {
    size_of::<W>() < size_of::<f64>() && coef != 0.0 && coef < f64::from(f32::MIN_POSITIVE)
}

#[inline(always)]
fn scale_all<W: Wide>(values: &mut [W], coef: f64) {
    let (factor, rest) = if is_tiny::<W>(coef) {
        (W::from_f64(coef.sqrt()), W::from_f64(coef.sqrt()))
    } else {
        (W::from_f64(coef), W::from_f64(1.0))
    };
    for x in values {
        *x = *x * factor * rest;
    }
}

#[inline(always)]
fn scale_each<W: Wide>(values: &mut [W], coefs: &[f64]) {
    let coefs = &coefs[..values.len()];
    // All are looked at, without a branch, so that both loops are vectors.
    let has_tiny = coefs
        .iter()
        .fold(false, |any, coef| any | is_tiny::<W>(*coef));
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
