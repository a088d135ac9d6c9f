//! Turns: who is timed, from both starts.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::cuda::case::{Case, Impl};
use crate::cuda::gpu::{BUSY_FILLS, Gpu, SCRATCH_BYTES};
use crate::cuda::task::{Start, Task};
use crate::element::Element;
use crate::op::params_adamw;
use crate::peer::Peer;
use crate::sets::Set;

/// Calls before the first that counts: drivers compile candle's kernels when they are first used.
const WARM_UPS: usize = 10;
/// Of how many rounds pasted code takes part in one: it launches a dozen kernels a tensor.
const ROUNDS_PER_PASTE_IN: usize = 5;

pub(crate) enum Who<'a> {
    Here(Impl),
    PyTorch(&'a mut PyTorch),
}

pub(crate) struct Rival<'a> {
    who: Who<'a>,
    /// Milliseconds from each of [`Start::ALL`].
    pub(crate) times: [Vec<f64>; 2],
    /// Relative, if it was compared with f64 arithmetic beforehand.
    pub(crate) norm_error: Option<f64>,
    /// Why it takes no part any more.
    pub(crate) failure: Option<String>,
}

impl<'a> Rival<'a> {
    pub(crate) fn new(who: Who<'a>, norm_error: Option<f64>) -> Self {
        Self {
            who,
            times: [Vec::new(), Vec::new()],
            norm_error,
            failure: None,
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self.who {
            Who::Here(of) => of.name(),
            Who::PyTorch(_) => "pytorch",
        }
    }

    fn is_pasted(&self) -> bool {
        matches!(self.who, Who::Here(Impl::PasteIn))
    }

    /// The time of a call, unless it is another process that fails.
    fn call<E: Element>(
        &mut self,
        case: &mut Case<E>,
        start: Start,
        gpu: &mut Gpu,
    ) -> Result<Option<f64>> {
        match &mut self.who {
            _ if self.failure.is_some() => Ok(None),
            Who::Here(of) => case.time(*of, start, gpu).map(Some),
            Who::PyTorch(peer) => match peer.time(start) {
                Ok(ms) => Ok(Some(ms)),
                Err(error) => {
                    self.failure = Some(format!("{error:#}"));
                    Ok(None)
                }
            },
        }
    }
}

/// Warms up, then lets rivals take turns; the first of each round changes.
pub(crate) fn take_turns<E: Element>(
    case: &mut Case<E>,
    gpu: &mut Gpu,
    rivals: &mut [Rival],
    rounds: usize,
) -> Result<()> {
    for rival in rivals.iter_mut() {
        let calls = if rival.is_pasted() { 2 } else { WARM_UPS };
        for _ in 0..calls {
            rival.call(case, Start::Idle, gpu)?;
        }
    }
    for round in 0..rounds {
        for (i, start) in Start::ALL.into_iter().enumerate() {
            for turn in 0..rivals.len() {
                let rival = &mut rivals[(round + turn) % rivals.len()];
                if rival.is_pasted() && !round.is_multiple_of(ROUNDS_PER_PASTE_IN) {
                    continue;
                }
                let ms = rival.call(case, start, gpu)?;
                rival.times[i].extend(ms);
            }
        }
    }
    for times in rivals.iter_mut().flat_map(|rival| &mut rival.times) {
        times.sort_by(f64::total_cmp);
    }
    Ok(())
}

/// PyTorch on the same GPU, in a process of its own: see `peers/peer_pytorch_cuda.py`.
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

    /// Prepares a task and compares what it does with f64 arithmetic; returns the relative error of its norm.
    pub(crate) fn check<E: Element>(&mut self, task: Task, set: Set) -> Result<Option<f64>> {
        let question = task.question::<E>(&set.shapes());
        let params = params_adamw();
        let answer: Answer = self.0.ask(&json!({
            "do": "check",
            "op": task.name(),
            "max_norm": question.max_norm,
            "lr": params.lr,
            "beta1": params.beta1,
            "beta2": params.beta2,
            "adam_eps": params.eps,
            "weight_decay": params.weight_decay,
        }))?;
        question.check_samples::<E>(&answer)
    }

    fn time(&mut self, start: Start) -> Result<f64> {
        #[derive(Deserialize)]
        struct Time {
            ms: f64,
        }
        let request = json!({ "do": "time", "start": start });
        let time: Time = self.0.ask(&request)?;
        Ok(time.ms)
    }
}
