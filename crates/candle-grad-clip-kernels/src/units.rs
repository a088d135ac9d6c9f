/// How the elements of a row-major matrix are divided into units.
///
/// ```
/// use candle_grad_clip_kernels::Units;
///
/// assert_eq!(Units::Rows(3).count(6), 2); // two rows of three elements
/// assert_eq!(Units::Columns(3).count(6), 3);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Units {
    /// Each row is a unit; the number is the row length.
    Rows(usize),
    /// Each column is a unit; the number is the number of columns.
    Columns(usize),
}

impl Units {
    /// The number of units in a matrix with `elements` elements.
    #[must_use]
    pub fn count(self, elements: usize) -> usize {
        match self {
            Self::Rows(length) => elements.checked_div(length).unwrap_or(0),
            Self::Columns(columns) => columns,
        }
    }

    /// The length of a row.
    pub(crate) fn row(self) -> usize {
        match self {
            Self::Rows(length) | Self::Columns(length) => length,
        }
    }
}
