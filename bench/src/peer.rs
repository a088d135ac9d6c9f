//! Other frameworks, each a process that speaks JSON lines: see `peers/protocol.py`.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::answer::{Answer, Question};
use crate::case::{Case, Machine};
use crate::element::Element;
use crate::op::{CLIP_VALUE, OTHER_BYTES, Op, params_adamw};
use crate::rival::Rival;
use crate::sets::Set;

/// A framework that is known here, whether installed or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Known {
    Pytorch,
    Tensorflow,
    Optax,
    Burn,
}

impl Known {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pytorch => "pytorch",
            Self::Tensorflow => "tensorflow",
            Self::Optax => "optax",
            Self::Burn => "burn",
        }
    }

    /// Starts it, or says how it is installed.
    pub(crate) fn start(self, venvs: &Path, threads: usize) -> Result<Peer, String> {
        let bench = Path::new(env!("CARGO_MANIFEST_DIR"));
        let name = self.name();
        let (program, script, install) = if self == Self::Burn {
            let target = bench.with_file_name("target").join("burn");
            let install = "cargo build --release --manifest-path bench/peers/burn/Cargo.toml --target-dir target/burn";
            (target.join("release/burn-peer"), None, install.to_owned())
        } else {
            let venv = venvs.join(format!("venv-{name}"));
            let install = format!(
                "python3 -m venv {0} && {0}/bin/pip install -r bench/peers/requirements-{name}.txt",
                venv.display()
            );
            let script = bench.join(format!("peers/peer_{name}.py"));
            (venv.join("bin/python"), Some(script), install)
        };
        if !program.exists() {
            return Err(format!("{name} is not installed: {install}"));
        }
        let mut command = Command::new(program);
        command.args(script);
        Peer::start(command, threads)
            .map_err(|error| format!("{name} does not start: {error:#}; {install}"))
    }
}

/// What a framework says of itself.
#[derive(Debug, Deserialize)]
pub(crate) struct Hello {
    pub(crate) peer: String,
    pub(crate) version: String,
    ops: Vec<String>,
    dtypes: Vec<String>,
    /// Whether its limit is one for each tensor's norm, not for the norm of all.
    #[serde(default)]
    pub(crate) clips_each_tensor: bool,
    /// More tensors than this are not worth the wait for its compiler.
    pub(crate) max_tensors: Option<usize>,
}

/// A running framework.
pub(crate) struct Peer {
    pub(crate) hello: Hello,
    command: Command,
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    pub(crate) fn start(mut command: Command, threads: usize) -> Result<Self> {
        command
            .args(["--threads", &threads.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Result<Self> {
        let mut child = command.spawn()?;
        let requests = child.stdin.take();
        let mut answers = BufReader::new(child.stdout.take().context("no standard output")?);
        let hello = receive(&mut answers)?;
        Ok(Self {
            hello,
            command,
            child,
            requests,
            answers,
        })
    }

    /// Ends the process and starts it anew.
    pub(crate) fn restart(&mut self) -> Result<()> {
        let command = std::mem::replace(&mut self.command, Command::new(""));
        self.end();
        *self = Self::spawn(command)?;
        Ok(())
    }

    /// The end of its input ends it; how it ends does not matter.
    fn end(&mut self) {
        self.requests = None;
        let _ = self.child.wait();
    }

    pub(crate) fn has<E: Element>(&self, op: Op) -> bool {
        let dtype = E::DTYPE.as_str();
        self.hello.ops.iter().any(|has| has == op.name())
            && self.hello.dtypes.iter().any(|has| has == dtype)
    }

    /// Makes a set's gradients and parameters.
    pub(crate) fn load<E: Element>(&mut self, set: Set) -> Result<()> {
        let cold_bytes = if set.is_cold() { OTHER_BYTES } else { 0 };
        let _: Value = self.ask(&json!({
            "do": "load",
            "dtype": E::DTYPE.as_str(),
            "shapes": set.shapes(),
            "cold_bytes": cold_bytes,
        }))?;
        Ok(())
    }

    /// Prepares an operation and says what it does: once, or if it is a step, twice.
    pub(crate) fn check(&mut self, question: &Question) -> Result<Answer> {
        let params = params_adamw();
        self.ask(&json!({
            "do": "check",
            "op": question.op.name(),
            "max_norm": question.max_norm,
            "clip_value": CLIP_VALUE,
            "lr": params.lr,
            "beta1": params.beta1,
            "beta2": params.beta2,
            "adam_eps": params.eps,
            "weight_decay": params.weight_decay,
        }))
    }

    /// Sends a request, and waits for its answer.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, request: &Value) -> Result<T> {
        let requests = self.requests.as_mut().context("it has ended")?;
        writeln!(requests, "{request}")?;
        receive(&mut self.answers)
    }
}

impl<E: Element, M: Machine<E>> Rival<Case<E, M>> for Peer {
    fn name(&self) -> &str {
        &self.hello.peer
    }

    fn question(&self, case: &Case<E, M>, op: Op) -> Question {
        if self.hello.clips_each_tensor {
            return Question::new::<E>(&case.shapes, true).about(op);
        }
        case.question.about(op)
    }

    fn answer(&mut self, _: &mut Case<E, M>, question: &Question) -> Result<Option<Answer>> {
        self.check(question).map(Some)
    }

    /// Its answer has prepared it.
    fn prepare(&mut self, _: &mut Case<E, M>, _: &Question) -> Result<()> {
        Ok(())
    }

    fn time(&mut self, _: &mut Case<E, M>, calls: usize) -> Result<Vec<f64>> {
        #[derive(Deserialize)]
        struct Times {
            ms: Vec<f64>,
        }
        let times: Times = self.ask(&json!({ "do": "time", "rounds": calls }))?;
        Ok(times.ms)
    }

    fn is_elsewhere(&self) -> bool {
        true
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.end();
    }
}

fn receive<T: DeserializeOwned>(answers: &mut impl BufRead) -> Result<T> {
    let mut line = String::new();
    if answers.read_line(&mut line)? == 0 {
        bail!("it ended without an answer");
    }
    let answer: Value = serde_json::from_str(&line).with_context(|| format!("it says {line}"))?;
    if let Some(error) = answer.get("error") {
        bail!("{error}");
    }
    Ok(serde_json::from_value(answer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(says: &str) -> Result<Peer> {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            &format!("printf '%s\\n' '{says}'; cat > /dev/null"),
            "sh",
        ]);
        Peer::start(command, 1)
    }

    #[test]
    fn a_peer_says_what_it_has() -> Result<()> {
        let hello = r#"{"peer": "p", "version": "p 1", "ops": ["clip_sgd"], "dtypes": ["f32"]}"#;
        let peer = peer(hello)?;
        assert!(peer.has::<f32>(Op::ClipSgd));
        assert!(!peer.has::<f32>(Op::ClipAdamW) && !peer.has::<half::bf16>(Op::ClipSgd));
        assert!(!peer.hello.clips_each_tensor);
        Ok(())
    }

    #[test]
    fn what_goes_wrong_in_a_peer_is_said_here() {
        let error = |says| peer(says).err().map(|error| format!("{error:#}"));
        assert_eq!(
            error(r#"{"error": "no memory"}"#).as_deref(),
            Some("\"no memory\"")
        );
        assert!(error("Traceback").is_some_and(|error| error.contains("Traceback")));
        let missing = Known::Optax.start(Path::new("/nowhere"), 1).err();
        assert!(missing.is_some_and(|line| line.contains("pip install")));
    }
}
