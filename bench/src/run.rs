//! The plain run: ours, pasted code and the floor.

use anyhow::Result;

use crate::case::Case;
use crate::element::Element;
use crate::op::{Impl, Op};
use crate::record::{GradNorms, Output, Record, floor_ms};
use crate::rival::{Plan, Rival, measure};
use crate::sets::Set;
use crate::threads::Threads;

/// Checks, then times every operation on a set.
pub(crate) fn time_set<E: Element>(
    set: Set,
    threads: Threads,
    rounds: usize,
    output: &mut Output,
) -> Result<()> {
    let mut case = Case::<E, _>::of_set(set)?;
    let mut plan = Plan::new(rounds);
    plan.per_paste_in = set.rounds_per_paste_in();
    let ops = Op::ALL.into_iter();
    for op in ops.filter(|op| E::HAS_STEPS || !op.is_step()) {
        let mut rivals = Impl::ALL;
        let rivals = rivals.iter_mut().map(|rival| rival as &mut dyn Rival<_>);
        let timed = measure(&mut case, op, rivals.collect(), &plan, &mut |_| {})?;
        let rows = timed.into_iter().map(|times| times.measured::<E>(set, op));
        let rows: Vec<GradNorms> = rows.collect();
        let floor_ms = floor_ms(&rows);
        for row in &rows {
            output.add(&Record {
                set: row.set,
                dtype: row.dtype,
                op: row.op,
                rival: &row.rival,
                threads: threads.count(),
                median_ms: row.median_ms,
                min_ms: row.min_ms,
                floor_ms,
                ratio_to_floor: row.median_ms / floor_ms,
            })?;
        }
    }
    Ok(())
}
