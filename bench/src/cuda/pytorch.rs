//! PyTorch on the same GPU, in its own process: see `peers/peer_pytorch_cuda.py`.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::answer::{Answer, Question};
use crate::case::Case;
use crate::cuda::case::OnGpu;
use crate::cuda::gpu::{BUSY_FILLS, SCRATCH_BYTES};
use crate::element::Element;
use crate::op::Op;
use crate::peer::Peer;
use crate::rival::Rival;
use crate::sets::Set;

/// The process.
pub(crate) struct PyTorch(Peer);

impl PyTorch {
    /// Starts it, or says why not.
    pub(crate) fn start(python: &str, peers: &Path, ordinal: usize) -> Result<Self, String> {
        let mut command = Command::new(python);
        command
            .arg(peers.join("peer_pytorch_cuda.py"))
            .args(["--device", &ordinal.to_string()]);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Peer::start(command, threads)
            .map(Self)
            .map_err(|error| format!("pytorch does not start with {python}: {error:#}"))
    }

    pub(crate) fn version(&self) -> &str {
        &self.0.hello.version
    }

    /// Makes a set's gradients and parameters, in a new process if the one before has ended.
    pub(crate) fn load<E: Element>(&mut self, set: Set) -> Result<()> {
        let request = json!({
            "do": "load",
            "dtype": E::DTYPE.as_str(),
            "shapes": set.shapes(),
            "is_cold": set.is_cold(),
            "scratch_bytes": SCRATCH_BYTES,
            "busy_fills": BUSY_FILLS,
        });
        let loaded: Result<Value> = self.0.ask(&request);
        if loaded.is_err() {
            self.0.restart()?;
            let _: Value = self.0.ask(&request)?;
        }
        Ok(())
    }

    /// Frees the memory. If that fails, what went wrong has been said, and `load` starts anew.
    pub(crate) fn unload(&mut self) {
        let _: Result<Value> = self.0.ask(&json!({ "do": "unload" }));
    }
}

impl<E: Element> Rival<Case<E, OnGpu<'_>>> for PyTorch {
    fn name(&self) -> &str {
        &self.0.hello.peer
    }

    fn question(&self, case: &Case<E, OnGpu<'_>>, op: Op) -> Question {
        let mut question = case.question.about(op);
        question.sums = false; // of 1.6 G elements
        question
    }

    fn answer(&mut self, _: &mut Case<E, OnGpu<'_>>, of: &Question) -> Result<Option<Answer>> {
        self.0.check(of).map(Some)
    }

    /// Its answer has prepared it.
    fn prepare(&mut self, _: &mut Case<E, OnGpu<'_>>, _: &Question) -> Result<()> {
        Ok(())
    }

    fn time(&mut self, case: &mut Case<E, OnGpu<'_>>, calls: usize) -> Result<Vec<f64>> {
        #[derive(Deserialize)]
        struct Time {
            ms: f64,
        }
        let request = json!({ "do": "time", "start": case.machine.start });
        let time = |_| Ok(self.0.ask::<Time>(&request)?.ms);
        (0..calls).map(time).collect()
    }

    fn is_elsewhere(&self) -> bool {
        true
    }
}
