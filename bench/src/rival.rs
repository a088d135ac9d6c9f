//! Who is timed, and the order of turns.

use anyhow::Result;

use crate::case::Case;
use crate::element::Element;
use crate::op::{Impl, Op};
use crate::peer::Peer;

/// A rival this many times slower than the fastest ...
const SLOW: f64 = 10.0;
/// ... takes part in one of so many rounds.
const ROUNDS_PER_SLOW: usize = 5;
/// Who has taken this long for an operation is done with it.
const PATIENCE_MS: f64 = 15_000.0;

pub(crate) struct Rival<'a> {
    pub(crate) name: String,
    who: Who<'a>,
    /// Relative, where the rival says what the norm is.
    pub(crate) norm_error: Option<f64>,
    /// In milliseconds.
    pub(crate) times: Vec<f64>,
    /// Why it takes no part any more.
    pub(crate) failure: Option<String>,
}

enum Who<'a> {
    Ours(Impl),
    Peer(&'a mut Peer),
}

impl<'a> Rival<'a> {
    pub(crate) fn ours(of: Impl) -> Self {
        Self::new(of.name().to_owned(), Who::Ours(of), None)
    }

    pub(crate) fn peer(peer: &'a mut Peer, norm_error: Option<f64>) -> Self {
        Self::new(peer.hello.peer.clone(), Who::Peer(peer), norm_error)
    }

    fn new(name: String, who: Who<'a>, norm_error: Option<f64>) -> Self {
        Self {
            name,
            who,
            norm_error,
            times: Vec::new(),
            failure: None,
        }
    }

    fn fastest(&self) -> f64 {
        self.times.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn takes_part(&self, turn: usize, fastest_of_all: f64) -> bool {
        let is_slow = turn > 0 && self.fastest() > SLOW * fastest_of_all;
        let is_done = self.times.iter().sum::<f64>() > PATIENCE_MS;
        let sits_out = is_slow && !turn.is_multiple_of(ROUNDS_PER_SLOW);
        self.failure.is_none() && !is_done && !sits_out
    }

    fn turn<E: Element>(&mut self, case: &mut Case<E>, op: Op, calls: usize) -> Result<()> {
        match &mut self.who {
            Who::Ours(of) => {
                for _ in 0..calls {
                    self.times.push(case.time(*of, op)?.as_secs_f64() * 1e3);
                }
            }
            Who::Peer(peer) => match peer.time(calls) {
                Ok(times) => self.times.extend(times),
                Err(error) => self.failure = Some(format!("{error:#}")),
            },
        }
        Ok(())
    }
}

/// Rivals take turns of `calls` calls each, and the first of each round changes.
pub(crate) fn take_turns<E: Element>(
    case: &mut Case<E>,
    op: Op,
    rivals: &mut [Rival],
    turns: usize,
    calls: usize,
) -> Result<()> {
    for turn in 0..turns {
        let fastest = rivals.iter().map(Rival::fastest);
        let fastest = fastest.fold(f64::INFINITY, f64::min);
        for i in 0..rivals.len() {
            let rival = &mut rivals[(turn + i) % rivals.len()];
            if rival.takes_part(turn, fastest) {
                rival.turn(case, op, calls)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sets::Set;

    #[test]
    fn turns_are_equal_and_the_slow_have_fewer() -> Result<()> {
        let mut case = Case::<f32>::new(Set::D)?;
        let mut rivals = [Impl::Floor, Impl::PasteIn, Impl::CandleGradClip].map(Rival::ours);
        rivals[1].times = vec![PATIENCE_MS + 1.0];
        take_turns(&mut case, Op::TotalNorm, &mut rivals, 4, 3)?;
        assert_eq!(rivals.map(|rival| rival.times.len()), [12, 1, 12]);
        Ok(())
    }

    #[test]
    fn the_slow_sit_out_four_of_five_rounds() {
        let mut rival = Rival::ours(Impl::PasteIn);
        rival.times = vec![100.0];
        let parts =
            |rival: &Rival, fastest| (0..11).filter(|t| rival.takes_part(*t, fastest)).count();
        assert_eq!((parts(&rival, 5.0), parts(&rival, 50.0)), (3, 11));
        rival.failure = Some("no memory".into());
        assert_eq!(parts(&rival, 50.0), 0);
    }
}
