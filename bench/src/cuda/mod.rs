//! The benchmark on a GPU: answers first, then times by the GPU's own clock.

mod case;
mod gpu;
mod report;
mod rival;
mod steps;
mod targets;
mod task;

use std::path::PathBuf;

use anyhow::Result;
use half::bf16;
use serde::Serialize;

use crate::cuda::case::{Case, Impl};
use crate::cuda::gpu::Gpu;
use crate::cuda::rival::{PyTorch, Rival, Who, take_turns};
use crate::cuda::task::{Start, Task};
use crate::element::Element;
use crate::record::median;
use crate::record::{Findings, Measured};
use crate::sets::Set;

/// Times clipping on a GPU beside pasted code, PyTorch and plain copies, and writes RESULTS-cuda.md.
#[derive(Debug, clap::Args)]
pub(crate) struct Cuda {
    /// Gradient sets; E is GPT-2 XL's 580 tensors, 1.6 G elements.
    #[arg(long, value_delimiter = ',', default_value = "A,B,C,D,E")]
    sets: Vec<Set>,
    /// Dtypes of gradients and parameters.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    dtypes: Vec<DTypeArg>,
    /// Timed calls of every rival from each start [default: as many as make the set's medians stable].
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

/// One rival's times for one task on one set, from one start.
#[derive(Debug, Serialize)]
struct Row {
    start: Start,
    #[serde(flatten)]
    measured: Measured,
    /// The floor of this task: what has to be read and written.
    bytes_moved: usize,
    ratio_to_floor: f64,
}

impl Cuda {
    pub(crate) fn run(&self) -> Result<()> {
        std::fs::create_dir_all(&self.out)?; // now, not after all the timing
        let mut gpu = Gpu::open(self.device)?;
        eprintln!("{}", gpu.description);
        let mut found = Findings::default();
        let mut pytorch = match PyTorch::start(&self.python, &self.peers, self.device) {
            Ok(pytorch) => {
                found.versions.push(pytorch.version().to_owned());
                Some(pytorch)
            }
            Err(note) => {
                found.note(note);
                None
            }
        };
        let mut rows = Vec::new();
        let result = self.sets(&mut gpu, pytorch.as_mut(), &mut rows, &mut found);
        if let Err(error) = &result {
            found.note(format!("ended early: {error:#}"));
        }
        report::write(&self.out, &gpu.description, &rows, &found)?;
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
                rows.extend(add(self, *set, gpu, pytorch.as_deref_mut(), found)?);
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
        found: &mut Findings,
    ) -> Result<Vec<Row>> {
        let (name, dtype) = (set.name(), E::DTYPE.as_str());
        let (needs, free) = (Case::<E>::bytes(set), gpu.free_bytes()?);
        if needs > free {
            found.note(format!(
                "{name} in {dtype} does not fit: it needs {:.1} GB, and {:.1} GB are free",
                needs as f64 / 1e9,
                free as f64 / 1e9
            ));
            return Ok(Vec::new());
        }
        let mut case = Case::<E>::new(set, &gpu.device)?;
        if let Some(peer) = &mut pytorch
            && let Err(error) = peer.load::<E>(set)
        {
            found.note(format!("pytorch: not on {name} in {dtype}: {error:#}"));
            pytorch = None;
        }
        let mut rows = Vec::new();
        for task in Task::ALL {
            eprintln!("{name} {dtype} {}", task.name());
            rows.extend(self.task(&mut case, set, task, gpu, pytorch.as_deref_mut(), found)?);
        }
        if let Some(peer) = pytorch {
            peer.unload();
        }
        Ok(rows)
    }

    /// Checks and times a task.
    fn task<E: Element>(
        &self,
        case: &mut Case<E>,
        set: Set,
        task: Task,
        gpu: &mut Gpu,
        pytorch: Option<&mut PyTorch>,
        found: &mut Findings,
    ) -> Result<Vec<Row>> {
        let (here, notes) = case.begin(task, gpu)?;
        for note in notes {
            found.note(note);
        }
        let here = here.into_iter().map(|of| Rival::new(Who::Here(of), None));
        let mut rivals: Vec<Rival> = here.collect();
        if let Some(peer) = pytorch {
            match peer.check::<E>(task, set) {
                Ok(norm_error) => rivals.push(Rival::new(Who::PyTorch(peer), norm_error)),
                Err(error) => found.note(format!(
                    "pytorch: no {} on {} in {}: {error:#}",
                    task.name(),
                    set.name(),
                    E::DTYPE.as_str()
                )),
            }
        }
        let rounds = self.rounds.unwrap_or_else(|| set.rounds().min(200)).max(1);
        take_turns(case, gpu, &mut rivals, rounds)?;
        for rival in &rivals {
            if let Some(failure) = &rival.failure {
                let (rival, set) = (rival.name(), set.name());
                found.note(format!("{rival}: {} on {set}: {failure}", task.name()));
            }
        }
        let bytes_moved = case.bytes_moved();
        let floor = rivals
            .iter()
            .find(|rival| rival.name() == Impl::Floor.name());
        let floors = floor.map_or([f64::NAN; 2], |floor| {
            floor.times.each_ref().map(|t| median(t))
        });
        let row = |rival: &Rival, i: usize| {
            let median_ms = median(&rival.times[i]);
            Row {
                start: Start::ALL[i],
                measured: Measured {
                    set: set.name(),
                    dtype: E::DTYPE.as_str(),
                    op: task.name(),
                    rival: rival.name().to_owned(),
                    calls: rival.times[i].len(),
                    median_ms,
                    min_ms: rival.times[i][0],
                    norm_error: rival.norm_error,
                },
                bytes_moved,
                ratio_to_floor: median_ms / floors[i],
            }
        };
        let mut rows = Vec::new();
        for i in 0..Start::ALL.len() {
            let timed = rivals.iter().filter(|rival| !rival.times[i].is_empty());
            rows.extend(timed.map(|rival| row(rival, i)));
        }
        Ok(rows)
    }
}
