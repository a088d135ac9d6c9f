//! How cost grows with the number of elements and of tensors.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::case::Case;
use crate::chart;
use crate::cpu::Cpu;
use crate::op::{Impl, Op};
use crate::record::{Point, median};
use crate::rival::{Plan, Rival, measure};
use crate::sets::uniform_lengths;
use crate::threads::Threads;

/// Time that a point may take, for all rivals together: large ones get fewer rounds.
const TIME: Duration = Duration::from_secs(6);
const ROUNDS: usize = 41;

/// Times clipping from 1,000 to 100 million elements and from 1 to 100,000 tensors, and draws it on a page.
#[derive(Debug, clap::Args)]
pub(crate) struct Growth {
    /// The largest number of elements of one tensor.
    #[arg(long, default_value_t = 100_000_000)]
    max_elements: usize,
    /// The largest number of tensors.
    #[arg(long, default_value_t = 100_000)]
    max_tensors: usize,
    /// Threads of every rival [default: all cores].
    #[arg(long)]
    threads: Option<usize>,
    /// Where growth.csv and growth.html go.
    #[arg(long, default_value = env!("CARGO_MANIFEST_DIR"))]
    out: PathBuf,
}

impl Growth {
    pub(crate) fn run(&self) -> Result<()> {
        std::fs::create_dir_all(&self.out)?; // now, not after all the timing
        Threads::start(self.threads)?;
        let mut points = Vec::new();
        for elements in sizes(1000, self.max_elements) {
            time("elements", elements, vec![vec![elements]], &mut points)?;
        }
        for tensors in sizes(1, self.max_tensors) {
            let shapes = uniform_lengths(tensors, 100..=1000);
            time("tensors", tensors, shapes, &mut points)?;
        }
        let lines = points.iter().map(|point| {
            let Point {
                op,
                of,
                count,
                rival,
                median_ms,
                calls,
            } = point;
            format!("{op},{of},{count},{rival},{median_ms:.6},{calls}\n")
        });
        let csv = format!(
            "op,of,count,rival,median_ms,calls\n{}",
            lines.collect::<String>()
        );
        println!("{csv}");
        let written = std::fs::write(self.out.join("growth.csv"), csv);
        chart::growth(&OPS, &points).write(&self.out.join("growth.html"))?;
        Ok(written?)
    }
}

const OPS: [Op; 2] = [Op::ClipGradNorm, Op::ClipAdamW];

fn time(
    of: &'static str,
    count: usize,
    shapes: Vec<Vec<usize>>,
    points: &mut Vec<Point>,
) -> Result<()> {
    let mut case = Case::new(shapes, Cpu::<f32>::new(true))?;
    for op in OPS {
        eprintln!("{} of {count} {of}", op.name());
        let mut plan = Plan::new(ROUNDS);
        plan.warm_ups = 1; // the first step makes the moments
        plan.deadline = Some(Instant::now() + TIME);
        let mut rivals = Impl::ALL;
        let rivals = rivals.iter_mut().map(|rival| rival as &mut dyn Rival<_>);
        for mut times in measure(&mut case, op, rivals.collect(), &plan, &mut |_| {})? {
            times.ms.sort_by(f64::total_cmp);
            points.push(Point {
                op: op.name(),
                of,
                count,
                rival: times.name,
                median_ms: median(&times.ms),
                calls: times.ms.len(),
            });
        }
    }
    Ok(())
}

/// From `first` to `last`, each about the square root of 10 times the one before.
fn sizes(first: usize, last: usize) -> Vec<usize> {
    let half_decades =
        |half: i32| (first as f64 * 10f64.powf(f64::from(half) / 2.0)).round() as usize;
    (0..40)
        .map(half_decades)
        .take_while(|size| *size <= last)
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_are_two_a_decade() {
        assert_eq!(super::sizes(1, 1000), [1, 3, 10, 32, 100, 316, 1000]);
    }
}
