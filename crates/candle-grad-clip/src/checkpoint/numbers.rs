//! Writes and reads the numbers of a file, little-endian, one array at a time, each with a
//! checksum.

use std::fs::File;
use std::io::{BufReader, Read, Write};

use safetensors::tensor::TensorInfo;

use super::fault::{Checked, Fault};
use super::file::{BUFFER_BYTES, Place, hex};
use crate::param_state::{arrays_mut, stride};

/// The numbers that an array may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Range {
    /// All: the numbers are checked elsewhere, or were saved unchecked.
    Any,
    Finite,
    /// Finite, and 0 or above.
    NotNegative,
    /// NaN, or 0 or above.
    NotBelowZero,
}

impl Range {
    /// The range of a Var's array, by its name.
    pub(super) fn of(key: &str, non_finite: bool) -> Self {
        match (key.ends_with("second_moment"), non_finite) {
            (false, false) => Self::Finite,
            (false, true) => Self::Any,
            (true, false) => Self::NotNegative,
            (true, true) => Self::NotBelowZero,
        }
    }

    fn has(self, x: f64) -> bool {
        match self {
            Self::Any => true,
            Self::Finite => x.is_finite(),
            Self::NotNegative => x.is_finite() && x >= 0.0,
            Self::NotBelowZero => x >= 0.0 || x.is_nan(),
        }
    }

    /// The first number outside the range.
    fn first_outside<W: Copy + Into<f64>>(self, numbers: &[W]) -> Option<f64> {
        // Without an early exit, which makes the loop fast.
        let all = numbers
            .iter()
            .fold(true, |all, x| all & self.has((*x).into()));
        let mut numbers = numbers.iter().map(|x| (*x).into());
        if all {
            return None;
        }
        numbers.find(|x| !self.has(*x))
    }
}

/// Writes arrays one after the other, and computes the checksum of each.
pub(super) struct Writer<'a, W: Write> {
    pub(super) out: &'a mut W,
    /// The names of the arrays that are left.
    pub(super) keys: std::slice::Iter<'a, (String, TensorInfo)>,
    /// The checksums of the written arrays.
    pub(super) sums: Vec<u32>,
    /// Whether numbers may be NaN or infinite.
    pub(super) non_finite: bool,
}

/// How many numbers are read or written at a time, so that they stay in the cache.
const CHUNK: usize = BUFFER_BYTES / 8;

impl<W: Write> Writer<'_, W> {
    /// Writes the next array.
    pub(super) fn write<N: bytemuck::NoUninit + Into<f64>>(
        &mut self,
        numbers: &[N],
    ) -> Checked<()> {
        let key = self.keys.next().map_or("", |(key, _)| key);
        let range = Range::of(key, self.non_finite);
        let mut sum = crc32fast::Hasher::new();
        sum.update(key.as_bytes());
        for numbers in numbers.chunks(CHUNK) {
            if let Some(bad) = range.first_outside(numbers) {
                return Err(Fault::Invalid(format!(
                    "nothing was saved, since the state is ruined: {key:?} (Var and array) has {bad}; go back to an \
                     earlier checkpoint, or take save_non_finite if NaN and infinity are meant"
                )));
            }
            if cfg!(target_endian = "little") {
                let bytes = bytemuck::cast_slice(numbers);
                sum.update(bytes);
                self.out.write_all(bytes)?;
                continue;
            }
            for number in numbers {
                let mut bytes = bytemuck::bytes_of(number).to_vec();
                bytes.reverse();
                sum.update(&bytes);
                self.out.write_all(&bytes)?;
            }
        }
        self.sums.push(sum.finalize());
        Ok(())
    }
}

/// Reads the numbers of a file.
pub(super) struct Reader {
    reader: BufReader<File>,
    /// The reader's position, from the end of the header.
    position: u64,
}

impl Reader {
    /// For a file's reader that is at the end of the header.
    pub(super) fn new(reader: BufReader<File>) -> Self {
        Self {
            reader,
            position: 0,
        }
    }

    /// Reads arrays of one length, in the layout of [`State::Host`](crate::param_state::State), and
    /// checks their checksums and ranges.
    pub(super) fn read<W: bytemuck::Pod + Into<f64>>(
        &mut self,
        places: &[Place],
        len: usize,
        non_finite: bool,
    ) -> Checked<Vec<W>> {
        let mut numbers = vec![W::zeroed(); places.len() * stride(len)];
        for (place, array) in places.iter().zip(arrays_mut(&mut numbers, len)) {
            let range = Range::of(&place.key, non_finite);
            self.read_array(place, array, range)?;
        }
        Ok(numbers)
    }

    /// Reads a list, whose numbers the caller checks.
    pub(super) fn read_list(&mut self, place: &Place) -> Checked<Vec<f64>> {
        let mut numbers = vec![0.0; place.len];
        self.read_array(place, &mut numbers, Range::Any)?;
        Ok(numbers)
    }

    fn read_array<W: bytemuck::Pod + Into<f64>>(
        &mut self,
        place: &Place,
        array: &mut [W],
        range: Range,
    ) -> Checked<()> {
        self.reader
            .seek_relative(place.offset.wrapping_sub(self.position).cast_signed())?;
        self.position = place.offset + size_of_val(array) as u64;
        let mut sum = crc32fast::Hasher::new();
        sum.update(place.key.as_bytes());
        let mut outside = None;
        for numbers in array.chunks_mut(CHUNK) {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(numbers);
            self.reader.read_exact(bytes)?;
            sum.update(bytes);
            if cfg!(target_endian = "big") {
                let numbers = bytes.chunks_exact_mut(size_of::<W>());
                numbers.for_each(<[u8]>::reverse);
            }
            outside = outside.or_else(|| range.first_outside(numbers));
        }
        let (key, sum) = (&place.key, sum.finalize());
        if sum != place.sum {
            return Err(Fault::Invalid(format!(
                "tensor {key:?} is damaged: its checksum is {}, expected {}",
                hex(sum),
                hex(place.sum)
            )));
        }
        outside.map_or(Ok(()), |bad| {
            let expected = match range {
                Range::NotNegative => "finite numbers, 0 or above",
                _ => "finite numbers",
            };
            Err(Fault::Invalid(format!(
                "tensor {key:?} has {bad}, expected {expected}"
            )))
        })
    }
}
