//! The floor: plain loops over the gradients' own memory, and nothing else.
//!
//! What clipping would take if tensors, locks, checks and arithmetic cost nothing. Tensors are
//! resolved to slices, and slices cut into pieces, before the clock starts; a piece is about 256
//! KiB, one of a large tensor or a run of small ones, and idle threads take the next.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::{Tensor, Var};
use rayon::prelude::*;

use crate::element::Element;
use crate::memory::with_elements;
use crate::op::Op;

/// The memory that one task walks over.
const PIECE_BYTES: usize = 1 << 18;

/// Does the least that `op` needs to the memory of `grads`, and returns the time it took.
pub(crate) fn time<E: Element>(op: Op, grads: &[&Tensor], coef: f64) -> Result<Duration> {
    with_elements::<E, _>(grads, |elements| {
        let mut pieces = pieces(elements);
        let start = Instant::now();
        match op {
            Op::TotalNorm | Op::ClipGradNormNoop => read(&mut pieces),
            Op::ClipGradNorm => {
                read(&mut pieces);
                // Reading has left the last pieces in the cache.
                scale(&mut pieces, coef, true);
            }
            Op::ClipGradValue => scale(&mut pieces, coef, false),
            _ => unreachable!("`time_step` does steps"),
        }
        start.elapsed()
    })
}

/// Two arrays of f32 for each parameter.
#[derive(Default)]
pub(crate) struct Moments(Vec<[Vec<f32>; 2]>);

impl Moments {
    pub(crate) fn new(vars: &[Var]) -> Self {
        // Written to, or they would share one page of zeros.
        let ones = |var: &Var| [vec![1.0; var.elem_count()], vec![1.0; var.elem_count()]];
        Self(vars.iter().map(ones).collect())
    }
}

/// Part of a parameter, with its gradient and its moments (empty if there are none).
struct Part<'a, E> {
    params: &'a mut [E],
    grads: &'a mut [E],
    moments: [&'a mut [f32]; 2],
}

/// The least of a step: reads the gradients, then all four (or two), and writes all but the
/// gradients.
pub(crate) fn time_step<E: Element>(
    grads: &[&Tensor],
    params: &[&Tensor],
    moments: &mut Moments,
) -> Result<Duration> {
    let tensors: Vec<&Tensor> = grads.iter().chain(params).copied().collect();
    with_elements::<E, _>(&tensors, |mut grads| {
        let params = grads.split_off(params.len());
        moments.0.resize_with(params.len(), Default::default);
        let mut parts = Vec::new();
        for ((params, grads), [first, second]) in params.into_iter().zip(grads).zip(&mut moments.0)
        {
            let limit = PIECE_BYTES / size_of::<E>();
            let mut moments = first.chunks_mut(limit).zip(second.chunks_mut(limit));
            let chunks = params.chunks_mut(limit).zip(grads.chunks_mut(limit));
            parts.extend(chunks.map(|(params, grads)| Part {
                params,
                grads,
                moments: moments.next().map(|(m, v)| [m, v]).unwrap_or_default(),
            }));
        }
        let mut pieces = pieces_of(
            parts,
            |part| part.params.len(),
            PIECE_BYTES / size_of::<E>(),
        );
        let start = Instant::now();
        each(&mut pieces, false, |part| {
            black_box(E::read(part.grads));
        });
        each(&mut pieces, true, |part| {
            let [first, second] = &mut part.moments;
            if first.is_empty() {
                E::descend(black_box(part.params), part.grads);
            } else {
                E::step(black_box(part.params), part.grads, first, second);
            }
        });
        start.elapsed()
    })
}

/// Runs of slices of about [`PIECE_BYTES`] each; larger slices are cut.
fn pieces<E: Element>(elements: Vec<&mut [E]>) -> Vec<Vec<&mut [E]>> {
    let limit = PIECE_BYTES / size_of::<E>();
    let chunks = elements
        .into_iter()
        .flat_map(|slice| slice.chunks_mut(limit));
    pieces_of(chunks, |chunk| chunk.len(), limit)
}

/// Puts parts together until they have about `limit` elements.
fn pieces_of<P>(
    parts: impl IntoIterator<Item = P>,
    elements: impl Fn(&P) -> usize,
    limit: usize,
) -> Vec<Vec<P>> {
    let mut pieces = Vec::new();
    let (mut piece, mut len) = (Vec::new(), 0);
    for part in parts {
        if len + elements(&part) > limit {
            pieces.push(std::mem::take(&mut piece));
            len = 0;
        }
        len += elements(&part);
        piece.push(part);
    }
    pieces.push(piece);
    pieces
}

fn read<E: Element>(pieces: &mut [Vec<&mut [E]>]) {
    each(pieces, false, |slice| {
        black_box(E::read(slice));
    });
}

fn scale<E: Element>(pieces: &mut [Vec<&mut [E]>], coef: f64, backwards: bool) {
    each(pieces, backwards, |slice| {
        E::scale(black_box(slice), black_box(coef));
    });
}

/// Calls `f` with every part, in as many threads as there are. One piece is not worth waking one
/// for.
fn each<P: Send>(pieces: &mut [Vec<P>], backwards: bool, f: impl Fn(&mut P) + Sync) {
    let all = |piece: &mut Vec<P>| piece.iter_mut().for_each(&f);
    if let [piece] = pieces {
        all(piece);
    } else if backwards {
        pieces.par_iter_mut().rev().for_each(all);
    } else {
        pieces.par_iter_mut().for_each(all);
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
