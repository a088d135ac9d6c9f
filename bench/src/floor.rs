//! The floor: plain loops over the gradients' own memory, and nothing else.
//!
//! What clipping would take if tensors, locks, checks and arithmetic cost nothing. Tensors are
//! resolved to slices, and slices cut into pieces, before the clock starts; a piece is about 256 KiB,
//! one of a large tensor or a run of small ones, and idle threads take the next.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::Tensor;
use rayon::prelude::*;

use crate::case::Op;
use crate::element::Element;
use crate::memory::with_elements;

/// The memory that one task walks over.
const PIECE_BYTES: usize = 1 << 18;

/// Does the least that `op` needs to the memory of `grads`, and returns the time it took.
pub(crate) fn time<E: Element>(op: Op, grads: &[&Tensor], coef: f64) -> Result<Duration> {
    with_elements::<E, _>(grads, |elements| {
        let mut pieces = pieces(elements);
        let start = Instant::now();
        match op {
            Op::TotalNorm | Op::ClipGradNormNoop => read(&pieces),
            Op::ClipGradNorm => {
                read(&pieces);
                // Reading has left the last pieces in the cache.
                scale(&mut pieces, coef, true);
            }
            Op::ClipGradValue => scale(&mut pieces, coef, false),
        }
        start.elapsed()
    })
}

/// Runs of slices of about [`PIECE_BYTES`] each; larger slices are cut.
fn pieces<E: Element>(elements: Vec<&mut [E]>) -> Vec<Vec<&mut [E]>> {
    let limit = PIECE_BYTES / size_of::<E>();
    let mut pieces = Vec::new();
    let (mut piece, mut len) = (Vec::new(), 0);
    for chunk in elements
        .into_iter()
        .flat_map(|slice| slice.chunks_mut(limit))
    {
        if len + chunk.len() > limit {
            pieces.push(std::mem::take(&mut piece));
            len = 0;
        }
        len += chunk.len();
        piece.push(chunk);
    }
    pieces.push(piece);
    pieces
}

fn read<E: Element>(pieces: &[Vec<&mut [E]>]) {
    let read = |piece: &Vec<&mut [E]>| {
        for slice in piece {
            black_box(E::read(slice));
        }
    };
    // One piece is not worth waking a thread for.
    if let [piece] = pieces {
        read(piece);
    } else {
        pieces.par_iter().for_each(read);
    }
}

fn scale<E: Element>(pieces: &mut [Vec<&mut [E]>], coef: f64, backwards: bool) {
    let scale = |piece: &mut Vec<&mut [E]>| {
        for slice in piece {
            E::scale(black_box(slice), black_box(coef));
        }
    };
    if let [piece] = pieces {
        scale(piece);
    } else if backwards {
        pieces.par_iter_mut().rev().for_each(scale);
    } else {
        pieces.par_iter_mut().for_each(scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_hold_every_element_once_and_are_not_too_large() {
        let limit = PIECE_BYTES / size_of::<f32>();
        for lens in [
            vec![0],
            vec![3 * limit + 1],
            vec![limit / 3; 10],
            vec![1, limit, 1],
        ] {
            let mut memory: Vec<Vec<f32>> = lens.iter().map(|len| vec![0.0; *len]).collect();
            let mut pieces = pieces(memory.iter_mut().map(Vec::as_mut_slice).collect());
            for piece in &mut pieces {
                assert!(piece.iter().map(|slice| slice.len()).sum::<usize>() <= limit);
                for x in piece.iter_mut().flat_map(|slice| slice.iter_mut()) {
                    *x += 1.0;
                }
            }
            assert!(memory.iter().flatten().all(|x| *x == 1.0), "{lens:?}");
        }
    }
}
