//! The benchmark on a GPU: answers first, then times by the GPU's own clock.

mod case;
mod gpu;
mod pytorch;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Result;
use half::bf16;
use serde::Serialize;

use crate::case::Case;
use crate::cuda::case::{OnGpu, bytes_moved};
use crate::cuda::gpu::{Gpu, Start};
use crate::cuda::pytorch::PyTorch;
use crate::element::Element;
use crate::op::{Impl, Op};
use crate::record::{Findings, GradNorms, floor_ms};
use crate::results::{about, groups, head, of, section};
use crate::rival::{Plan, Rival, measure};
use crate::sets::Set;

/// Of how many rounds pasted code takes part in one: it launches a dozen kernels a tensor.
const ROUNDS_PER_PASTE_IN: usize = 5;
/// Calls before the first that counts: drivers compile candle's kernels when they are first used.
const WARM_UPS: usize = 10;

/// Times clipping on a GPU beside pasted code, PyTorch and plain copies, and writes
/// RESULTS-cuda.md.
#[derive(Debug, clap::Args)]
pub(crate) struct Cuda {
    /// Gradient sets; E is GPT-2 XL's 580 tensors, 1.6 G elements.
    #[arg(long, value_delimiter = ',', default_value = "A,B,C,D,E")]
    sets: Vec<Set>,
    /// Dtypes of gradients and parameters.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    dtypes: Vec<DTypeArg>,
    /// Timed calls of every rival from each start [default: as many as make the set's medians
    /// stable].
    #[arg(long)]
    rounds: Option<usize>,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// A Python that has `PyTorch`.
    #[arg(long, default_value = "python3")]
    python: String,
    /// Where `peer_pytorch_cuda.py` is.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/peers"))]
    peers: PathBuf,
    /// Where results go.
    #[arg(long, default_value = env!("CARGO_MANIFEST_DIR"))]
    out: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum DTypeArg {
    F32,
    Bf16,
}

/// One rival's times for one operation on one set, from one start.
#[derive(Debug, Serialize)]
struct Row {
    start: Start,
    #[serde(flatten)]
    measured: GradNorms,
    /// The floor of this operation: what has to be read and written.
    bytes_moved: usize,
    ratio_to_floor: f64,
}

impl Cuda {
    pub(crate) fn run(&self) -> Result<()> {
        std::fs::create_dir_all(&self.out)?; // now, not after all the timing
        let mut gpu = Gpu::open(self.device)?;
        eprintln!("{}", gpu.description);
        let mut found = Findings::default();
        let started = PyTorch::start(&self.python, &self.peers, self.device);
        let mut pytorch = started.map_err(|note| found.note(note)).ok();
        found
            .versions
            .extend(pytorch.iter().map(|peer| peer.version().to_owned()));
        let mut rows = Vec::new();
        let result = self.sets(&mut gpu, pytorch.as_mut(), &mut rows, &mut found);
        if let Err(error) = &result {
            found.note(format!("ended early: {error:#}"));
        }
        self.write(&gpu.description, &rows, &found)?;
        result
    }

    fn sets(
        &self,
        gpu: &mut Gpu,
        mut pytorch: Option<&mut PyTorch>,
        rows: &mut Vec<Row>,
        found: &mut Findings,
    ) -> Result<()> {
        for set in &self.sets {
            for dtype in &self.dtypes {
                let add = match dtype {
                    DTypeArg::F32 => Self::set::<f32>,
                    DTypeArg::Bf16 => Self::set::<bf16>,
                };
                add(self, *set, gpu, pytorch.as_deref_mut(), rows, found)?;
            }
        }
        Ok(())
    }

    /// Measures a set, if it fits.
    fn set<E: Element>(
        &self,
        set: Set,
        gpu: &mut Gpu,
        mut pytorch: Option<&mut PyTorch>,
        rows: &mut Vec<Row>,
        found: &mut Findings,
    ) -> Result<()> {
        let (name, dtype) = (set.name(), E::DTYPE.as_str());
        let elements = |shape: &Vec<usize>| shape.iter().product::<usize>();
        let elements = set.shapes().iter().map(elements).sum::<usize>();
        // Parameters, gradients and a copy of those.
        let (needs, free) = (3 * size_of::<E>() * elements, gpu.free_bytes()?);
        if needs > free {
            found.note(format!(
                "{name} in {dtype} does not fit: it needs {:.1} GB, and {:.1} GB are free",
                needs as f64 / 1e9,
                free as f64 / 1e9
            ));
            return Ok(());
        }
        let mut case = Case::<E, _>::new(set.shapes(), OnGpu::new(gpu, set.is_cold()))?;
        if let Some(peer) = &mut pytorch
            && let Err(error) = peer.load::<E>(set)
        {
            found.note(format!("pytorch: not on {name} in {dtype}: {error:#}"));
            pytorch = None;
        }
        for op in Op::ON_GPU {
            let ours = who_fits(&mut case, set, op, found)?;
            for start in [Start::Idle, Start::Busy] {
                eprintln!("{name} {dtype} {} {start:?}", op.name());
                case.machine.start = start;
                let mut ours = ours.clone();
                let mut rivals: Vec<&mut dyn Rival<_>> = Vec::new();
                rivals.extend(ours.iter_mut().map(|of| of as &mut dyn Rival<_>));
                rivals.extend(pytorch.as_deref_mut().map(|peer| peer as &mut dyn Rival<_>));
                let mut note = |note| found.note(format!("{name} in {dtype}: {note}"));
                let plan = self.plan(set);
                let timed = measure(&mut case, op, rivals, &plan, &mut note)?;
                let timed = timed.into_iter().map(|times| times.measured::<E>(set, op));
                let timed: Vec<GradNorms> = timed.collect();
                let floor_ms = floor_ms(&timed);
                rows.extend(timed.into_iter().map(|measured| Row {
                    start,
                    ratio_to_floor: measured.median_ms / floor_ms,
                    measured,
                    bytes_moved: bytes_moved::<E>(op, elements),
                }));
            }
        }
        if let Some(peer) = pytorch {
            peer.unload();
        }
        Ok(())
    }

    fn plan(&self, set: Set) -> Plan {
        let rounds = self.rounds.unwrap_or_else(|| set.rounds().min(200));
        Plan {
            warm_ups: WARM_UPS,
            per_paste_in: ROUNDS_PER_PASTE_IN,
            ..Plan::new(rounds.max(1))
        }
    }

    /// Prints the results and writes them.
    fn write(&self, gpu: &str, rows: &[Row], found: &Findings) -> Result<()> {
        let text = markdown(gpu, rows, found)?;
        println!("{text}");
        let table = std::fs::write(self.out.join("RESULTS-cuda.md"), text);
        std::fs::write(self.out.join("results-cuda.jsonl"), lines(gpu, rows)?)?;
        Ok(table?)
    }
}

/// Those of this program that find room.
fn who_fits<E: Element>(
    case: &mut Case<E, OnGpu>,
    set: Set,
    op: Op,
    found: &mut Findings,
) -> Result<Vec<Impl>> {
    case.clear();
    let mut free = case.machine.free_bytes()?;
    let mut fit = Vec::new();
    let step_alone = (op == Op::NoneSgd).then_some(Impl::StepAlone);
    for rival in Impl::ALL.into_iter().chain(step_alone) {
        let needs = case.machine.bytes_of::<E>(rival, op);
        if needs > free {
            found.note(format!(
                "{}: no {} on {} in {}, as it needs {:.1} GB more than {:.1} GB",
                rival.name(),
                op.name(),
                set.name(),
                E::DTYPE.as_str(),
                (needs - free) as f64 / 1e9,
                free as f64 / 1e9,
            ));
            continue;
        }
        free -= needs;
        fit.push(rival);
    }
    Ok(fit)
}

/// A JSON object a line.
fn lines(gpu: &str, rows: &[Row]) -> Result<String> {
    #[derive(Serialize)]
    struct Line<'a> {
        gpu: &'a str,
        #[serde(flatten)]
        row: &'a Row,
    }
    let mut lines = String::new();
    for row in rows {
        lines += &serde_json::to_string(&Line { gpu, row })?;
        lines.push('\n');
    }
    Ok(lines)
}

fn markdown(gpu: &str, rows: &[Row], found: &Findings) -> Result<String> {
    let mut text = head("Results on a GPU", "--features cuda -- cuda", found)?;
    writeln!(text, "- GPU: {gpu}")?;
    for start in [Start::Idle, Start::Busy] {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.start == start).collect();
        let measured: Vec<GradNorms> = rows.iter().map(|row| row.measured.clone()).collect();
        for (set, dtype) in groups(&measured) {
            let about = about(set);
            writeln!(
                text,
                "\n## {set}, {dtype}, {start:?} at the start: {about}\n"
            )?;
            let rows_of_group: Vec<&GradNorms> = of(&measured, set, dtype).collect();
            section(&mut text, &Op::ON_GPU.map(Op::name), &rows_of_group)?;
            let floors = rows.iter().filter(|row| {
                let of = &row.measured;
                (of.set, of.dtype, of.rival.as_str()) == (set, dtype, Impl::Floor.name())
            });
            let rates: Vec<String> = floors
                .map(|row| {
                    let per_second = row.bytes_moved as f64 / 1e6 / row.measured.median_ms;
                    format!("{} {per_second:.0}", row.measured.op)
                })
                .collect();
            writeln!(text, "\nThe floor in GB/s: {}.", rates.join(", "))?;
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(start: Start, rival: &str, median_ms: f64) -> Row {
        Row {
            start,
            measured: GradNorms {
                set: "E",
                dtype: "f32",
                op: "total_norm",
                rival: rival.to_owned(),
                calls: 15,
                median_ms,
                min_ms: median_ms,
                norm_error: (rival == "pytorch").then_some(3e-4),
            },
            bytes_moved: 6_000_000_000,
            ratio_to_floor: median_ms / 2.0,
        }
    }

    #[test]
    fn a_section_has_times_ratios_and_the_floors_rate() -> Result<()> {
        let rows = [
            row(Start::Idle, "candle-grad-clip", 2.5),
            row(Start::Idle, "floor", 2.0),
            row(Start::Busy, "floor", 2.0),
            row(Start::Busy, "pytorch", 4.0),
        ];
        let found = Findings {
            notes: vec!["A does not fit".into()],
            ..Findings::default()
        };
        let text = markdown("a card, driver 1", &rows, &found)?;
        for part in [
            "- GPU: a card, driver 1",
            "- A does not fit",
            "## E, f32, Idle at the start: GPT-2 XL",
            "| candle-grad-clip | 2.50 (1.25) |",
            "| pytorch | 4.00 (2.00) |",
            "The floor in GB/s: total_norm 3000.",
            "Relative error of the norm: pytorch 3e-4.",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let lines = lines("a card", &rows)?;
        let line: serde_json::Value = serde_json::from_str(lines.lines().nth(2).unwrap_or(""))?;
        assert_eq!(
            (&line["start"], &line["rival"]),
            (&"busy".into(), &"floor".into())
        );
        Ok(())
    }
}
