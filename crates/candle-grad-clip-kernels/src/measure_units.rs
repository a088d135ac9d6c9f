//! Measures each row or column of a matrix individually.

use pulp::NullaryFnOnce;
use rayon::prelude::*;

use crate::block::BLOCK;
use crate::element::Element;
use crate::measure::{SAFE_SUM, Stats, measure};
use crate::norm_type::NormType;
use crate::scaled_power_sum::ScaledPowerSum;
use crate::simd::dispatch;
use crate::units::Units;

/// Columns per task, summed row by row: their sums stay in the L1 cache.
const COLUMNS: usize = 512;
/// Rows summed before the sums are folded. This limits the rounding error of a long column.
const ROWS: usize = 1024;
/// Rows up to this length are summed many per call: one call per row would take longer than the
/// sum.
const SHORT_ROW: usize = 256;
/// Lanes of the sum of a short row.
const LANES: usize = 4;

/// Measures each unit, as [`measure`](fn@measure) does a slice, into `stats`, which has one element
/// per unit. Parallel for more than one [`BLOCK`].
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
/// If the number of `stats` differs from the number of units, or the last row is incomplete.
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
        let how = Reduction::of(norm_type).filter(|_| row <= SHORT_ROW);
        if let Some(how) = how {
            dispatch(SumRows {
                values,
                row,
                how,
                stats: &mut *stats,
            });
        }
        for (values, stats) in values.chunks_exact(row).zip(stats) {
            if how.is_none() || stats.nan > 0 {
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

/// How the elements of a unit are combined without a scale.
#[derive(Clone, Copy)]
enum Reduction {
    Abs,
    Squares,
    Largest,
}

impl Reduction {
    fn of(norm_type: NormType) -> Option<Self> {
        match norm_type {
            NormType::L1 => Some(Self::Abs),
            NormType::L2 => Some(Self::Squares),
            NormType::Inf => Some(Self::Largest),
            NormType::P(_) => None,
        }
    }

    /// The result is NaN after the first NaN element.
    #[inline(always)]
    fn add(self, sum: f64, x: f64) -> f64 {
        match self {
            Self::Abs => sum + x.abs(),
            Self::Squares => sum + x * x,
            Self::Largest if sum >= x.abs() || sum.is_nan() => sum,
            Self::Largest => x.abs(),
        }
    }

    /// The stats of a finite unit, or `None` if the sum is not conclusive.
    #[inline(always)]
    fn stats<E: Element>(self, sum: f64) -> Option<Stats> {
        let is_right = match self {
            Self::Largest => sum.is_finite(),
            // For dtypes up to 32 bits only a non-finite element makes the sum non-finite.
            _ => (E::EXACT_SQUARES && sum.is_finite()) || SAFE_SUM.contains(&sum),
        };
        let power = match self {
            Self::Largest if sum > 0.0 => ScaledPowerSum {
                scale: sum,
                sum: 1.0,
            },
            Self::Largest => ScaledPowerSum::ZERO,
            Self::Abs | Self::Squares => ScaledPowerSum { scale: 1.0, sum },
        };
        is_right.then_some(Stats {
            power,
            ..Stats::ZERO
        })
    }
}

/// Marks a row whose plain sum is not usable. Two variants with an `Option` took two to three times
/// as long for rows of 4 and of 16 elements.
const MEASURE_AGAIN: Stats = Stats {
    nan: 1,
    ..Stats::ZERO
};

/// Writes the stats of each row, or [`MEASURE_AGAIN`].
struct SumRows<'a, E> {
    values: &'a [E],
    /// The row length.
    row: usize,
    how: Reduction,
    stats: &'a mut [Stats],
}

impl<E: Element> NullaryFnOnce for SumRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            values,
            row,
            how,
            stats,
        } = self;
        match how {
            Reduction::Abs => sum_rows(values, row, Reduction::Abs, stats),
            Reduction::Squares => sum_rows(values, row, Reduction::Squares, stats),
            Reduction::Largest => sum_rows(values, row, Reduction::Largest, stats),
        }
    }
}

#[inline(always)]
fn sum_rows<E: Element>(values: &[E], row: usize, how: Reduction, stats: &mut [Stats]) {
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
        *stats = how.stats::<E>(sum).unwrap_or(MEASURE_AGAIN);
    }
}

/// Combines two sums.
#[inline(always)]
fn fold(how: Reduction, a: f64, b: f64) -> f64 {
    match how {
        Reduction::Abs | Reduction::Squares => a + b,
        Reduction::Largest => how.add(a, b),
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
        let Some(how) = Reduction::of(norm_type) else {
            return gather_columns(values, columns, first, norm_type, stats);
        };
        let (mut sums, mut of_rows) = ([0.0; COLUMNS], [0.0; COLUMNS]);
        let sums = &mut sums[..stats.len()];
        let of_rows = &mut of_rows[..stats.len()];
        for rows in values.chunks(ROWS * columns) {
            of_rows.fill(0.0);
            dispatch(SumColumns {
                rows,
                columns,
                first,
                how,
                sums: &mut *of_rows,
            });
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

/// Adds the elements of some rows to the sums of their columns. The first sum is that of column
/// `first`.
struct SumColumns<'a, E> {
    rows: &'a [E],
    columns: usize,
    first: usize,
    how: Reduction,
    sums: &'a mut [f64],
}

impl<E: Element> NullaryFnOnce for SumColumns<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            rows,
            columns,
            first,
            how,
            sums,
        } = self;
        for row in rows.chunks_exact(columns) {
            let row = &row[first..first + sums.len()];
            match how {
                Reduction::Abs => add_row(row, Reduction::Abs, sums),
                Reduction::Squares => add_row(row, Reduction::Squares, sums),
                Reduction::Largest => add_row(row, Reduction::Largest, sums),
            }
        }
    }
}

#[inline(always)]
fn add_row<E: Element>(row: &[E], how: Reduction, sums: &mut [f64]) {
    for (sum, x) in sums.iter_mut().zip(row) {
        *sum = how.add(*sum, x.to_f64());
    }
}

/// The slow path for columns without a usable plain sum: from `first` on, gathers each column and
/// measures it as a slice.
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
