//! Rivals in turn, so that all of them see the same machine.

use anyhow::Result;
use rayon::ThreadPoolBuilder;

use crate::case::Case;
use crate::element::Element;
use crate::op::{Impl, Op};
use crate::record::{Output, Record, median};
use crate::sets::Set;

/// How many threads every rival has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Threads(usize);

impl Threads {
    /// Starts rayon's pool, which the library, candle and the floor share.
    pub(crate) fn start(threads: Option<usize>) -> Result<Self> {
        ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .build_global()?;
        Ok(Self(rayon::current_num_threads()))
    }

    pub(crate) fn count(self) -> usize {
        self.0
    }
}

/// Checks, then times every operation on a set.
pub(crate) fn time_set<E: Element>(
    set: Set,
    threads: Threads,
    rounds: usize,
    output: &mut Output,
) -> Result<()> {
    let mut case = Case::<E>::new(set)?;
    for op in Op::ALL
        .into_iter()
        .filter(|op| E::HAS_STEPS || !op.is_step())
    {
        for rival in Impl::ALL {
            case.check(rival, op)?;
        }
        case.prepare(op)?;
        let mut times = Impl::ALL.map(|_| Vec::with_capacity(rounds));
        for round in 0..rounds {
            for turn in 0..Impl::ALL.len() {
                let i = (round + turn) % Impl::ALL.len();
                let rival = Impl::ALL[i];
                if rival == Impl::PasteIn && round % set.rounds_per_paste_in() != 0 {
                    continue;
                }
                times[i].push(case.time(rival, op)?.as_secs_f64() * 1e3);
            }
        }
        for times in &mut times {
            times.sort_by(f64::total_cmp);
        }
        let medians = times.each_ref().map(|times| median(times));
        let floor_ms = medians[Impl::ALL.len() - 1];
        for ((rival, times), median_ms) in Impl::ALL.iter().zip(&times).zip(medians) {
            output.add(&Record {
                set: set.name(),
                dtype: E::DTYPE.as_str(),
                op: op.name(),
                rival: rival.name(),
                threads: threads.0,
                median_ms,
                min_ms: times[0],
                floor_ms,
                ratio_to_floor: median_ms / floor_ms,
            })?;
        }
    }
    Ok(())
}
