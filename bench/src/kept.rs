//! Pasted code where the allocator keeps the memory it has.
//!
//! Most of what candle's operations take on large tensors is the system's: each temporary is
//! mapped, its pages are filled with zeros as they are touched, and it is given back. glibc can be
//! told not to, by its environment when a process starts, so this is its own process.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::case::Case;
use crate::op::{Impl, Op, PASTE_IN_KEPT};
use crate::record::{GradNorms, median};
use crate::rival::{Plan, measure};
use crate::sets::Set;
use crate::threads::Threads;

/// What is timed.
const OPS: [Op; 3] = [Op::ClipGradNorm, Op::ClipAdamW, Op::ClipSgd];
/// After the check, which has made room already.
const CALLS: usize = 3;

/// Times pasted code in this process.
#[derive(Debug, clap::Args)]
pub(crate) struct Kept {
    #[arg(long)]
    set: Set,
    #[arg(long)]
    threads: usize,
}

impl Kept {
    /// Prints an operation and its times in milliseconds on each line.
    pub(crate) fn run(&self) -> Result<()> {
        Threads::start(Some(self.threads))?;
        let mut case = Case::<f32, _>::of_set(self.set)?;
        let mut plan = Plan::new(CALLS);
        plan.warm_ups = 1; // the optimizer's first step is another
        for op in OPS {
            let mut pasted = Impl::PasteIn;
            let timed = measure(&mut case, op, vec![&mut pasted], &plan, &mut |_| {})?;
            let times = timed.iter().flat_map(|one| &one.ms);
            let times: Vec<String> = times.map(f64::to_string).collect();
            println!("{} {}", op.name(), times.join(" "));
        }
        Ok(())
    }
}

/// Whether the C library takes these settings.
pub(crate) fn is_possible() -> bool {
    cfg!(all(target_os = "linux", target_env = "gnu"))
}

/// Runs [`Kept`] in a process that maps nothing and gives nothing back.
pub(crate) fn time(set: Set, threads: usize) -> Result<Vec<GradNorms>> {
    let output = Command::new(std::env::current_exe()?)
        .args([
            "kept",
            "--set",
            set.name(),
            "--threads",
            &threads.to_string(),
        ])
        .env("MALLOC_MMAP_MAX_", "0")
        .env("MALLOC_TRIM_THRESHOLD_", "1000000000000")
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(
        output.status.success(),
        "{PASTE_IN_KEPT} ends with {}",
        output.status
    );
    let text = String::from_utf8(output.stdout)?;
    text.lines().map(|line| measured(set, line)).collect()
}

fn measured(set: Set, line: &str) -> Result<GradNorms> {
    let mut words = line.split(' ');
    let name = words.next().context("an empty line")?;
    let op = OPS.into_iter().find(|op| op.name() == name);
    let op = op.with_context(|| format!("no operation is called {name}"))?;
    let mut times = words.map(str::parse).collect::<Result<Vec<f64>, _>>()?;
    ensure!(!times.is_empty(), "no times of {name}");
    times.sort_by(f64::total_cmp);
    Ok(GradNorms {
        set: set.name(),
        dtype: "f32",
        op: op.name(),
        rival: PASTE_IN_KEPT.to_owned(),
        calls: times.len(),
        median_ms: median(&times),
        min_ms: times[0],
        norm_error: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_an_operation_and_its_times() -> Result<()> {
        let measured = measured(Set::B, "clip_sgd 3.5 1.25 2")?;
        assert_eq!((measured.op, measured.calls), ("clip_sgd", 3));
        assert_eq!((measured.median_ms, measured.min_ms), (2.0, 1.25));
        assert!(super::measured(Set::B, "clip_sgd").is_err());
        assert!(super::measured(Set::B, "clip_everything 1").is_err());
        Ok(())
    }
}
