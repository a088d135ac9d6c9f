//! Ours and other frameworks in turn, in one run: answers first, then times.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use half::bf16;
use serde::Serialize;

use crate::answer::Question;
use crate::case::{Case, Impl, Op};
use crate::element::Element;
use crate::peer::{Known, Peer};
use crate::sets::Set;
use crate::timing::{Threads, median};
use crate::{chart, kept, results};

/// A rival this many times slower than the fastest ...
const SLOW: f64 = 10.0;
/// ... takes part in one of so many rounds.
const ROUNDS_PER_SLOW: usize = 5;
/// Who has taken this long for an operation is done with it.
const PATIENCE_MS: f64 = 15_000.0;

/// Times other frameworks too, those that are installed, and writes RESULTS.md with a chart.
#[derive(Debug, clap::Args)]
pub(crate) struct Compare {
    /// Gradient sets.
    #[arg(long, value_delimiter = ',', default_value = "A,B,C,D")]
    sets: Vec<Set>,
    /// The frameworks, if they are installed.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "pytorch,tensorflow,optax,burn"
    )]
    peers: Vec<Known>,
    /// Threads of every rival [default: all cores].
    #[arg(long)]
    threads: Option<usize>,
    /// Rounds [default: as many as make the set's medians stable].
    #[arg(long)]
    rounds: Option<usize>,
    /// Where Python's environments are: venv-pytorch, venv-tensorflow, venv-optax [default: the system's temporary folder].
    #[arg(long)]
    venvs: Option<PathBuf>,
    /// Where results go.
    #[arg(long, default_value = env!("CARGO_MANIFEST_DIR"))]
    out: PathBuf,
}

/// One rival's times for one operation on one set.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Measured {
    pub(crate) set: &'static str,
    pub(crate) dtype: &'static str,
    pub(crate) op: &'static str,
    pub(crate) rival: String,
    pub(crate) calls: usize,
    pub(crate) median_ms: f64,
    pub(crate) min_ms: f64,
    /// Relative, where the rival says what the norm is.
    pub(crate) norm_error: Option<f64>,
}

/// All that a run found out.
#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) measured: Vec<Measured>,
    /// Names and versions of the frameworks.
    pub(crate) versions: Vec<String>,
    /// What was not timed, and why.
    pub(crate) notes: Vec<String>,
}

impl Findings {
    /// Puts what was timed later beside the rest of its set.
    fn add_beside(&mut self, later: Vec<Measured>) {
        for row in later {
            let beside = |other: &Measured| other.set == row.set && other.dtype == row.dtype;
            let end = self.measured.iter().rposition(beside).map_or(0, |i| i + 1);
            self.measured.insert(end, row);
        }
    }

    fn note(&mut self, note: String) {
        eprintln!("{note}");
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

impl Compare {
    pub(crate) fn run(&self) -> Result<()> {
        let threads = Threads::start(self.threads)?;
        let venvs = self.venvs.clone().unwrap_or_else(std::env::temp_dir);
        let mut found = Findings::default();
        let mut peers = Vec::new();
        for known in &self.peers {
            match known.start(&venvs, threads.count()) {
                Ok(peer) => {
                    found.versions.push(peer.hello.version.clone());
                    peers.push(peer);
                }
                Err(note) => found.note(note),
            }
        }
        for set in &self.sets {
            self.set::<f32>(*set, &Op::ALL, &mut peers, &mut found)?;
            if *set == Set::B {
                self.set::<bf16>(*set, &[Op::ClipAdamW], &mut peers, &mut found)?;
            }
        }
        drop(peers);
        for set in [Set::A, Set::B] {
            if kept::is_possible() && self.sets.contains(&set) {
                eprintln!("{} {}", set.name(), kept::NAME);
                let kept = kept::time(set, threads.count())?;
                found.add_beside(kept);
            }
        }
        write(&self.out, &found, threads.count())
    }

    fn set<E: Element>(
        &self,
        set: Set,
        ops: &[Op],
        peers: &mut Vec<Peer>,
        found: &mut Findings,
    ) -> Result<()> {
        let mut case = Case::<E>::new(set)?;
        let tensors = set.shapes().len();
        let mut active: Vec<&mut Peer> = Vec::new();
        for peer in peers {
            let name = peer.hello.peer.clone();
            if peer.hello.max_tensors.is_some_and(|max| max < tensors) {
                found.note(format!(
                    "{name}: not on {}, as it compiles {tensors} tensors for too long",
                    set.name()
                ));
            } else if !ops.iter().any(|op| peer.has::<E>(*op)) {
                found.note(format!("{name}: not in {}", E::DTYPE.as_str()));
            } else if let Err(error) = peer.load::<E>(set) {
                found.note(format!("{name}: not on {}: {error:#}", set.name()));
            } else {
                active.push(peer);
            }
        }
        let (turns, calls) = set.turns();
        let turns = self.rounds.unwrap_or(turns).max(1);
        for op in ops {
            eprintln!("{} {} {}", set.name(), E::DTYPE.as_str(), op.name());
            for rival in Impl::ALL {
                case.check(rival, *op)?;
            }
            case.prepare(*op)?;
            if op.is_step() {
                // The first makes the moments; peers have taken theirs in the check.
                for rival in Impl::ALL {
                    case.time(rival, *op)?;
                }
            }
            let mut rivals: Vec<Rival> = Impl::ALL.into_iter().map(Rival::ours).collect();
            for peer in &mut active {
                if !peer.has::<E>(*op) {
                    continue;
                }
                let name = peer.hello.peer.clone();
                let question = Question::new::<E>(&set.shapes(), *op, peer.hello.clips_each_tensor);
                let answer = peer.check(*op, question.max_norm);
                match answer.and_then(|answer| question.check::<E>(&answer)) {
                    Ok(norm_error) => rivals.push(Rival::peer(name, peer, norm_error)),
                    Err(error) => found.note(format!(
                        "{name}: {} on {} is not right: {error:#}",
                        op.name(),
                        set.name()
                    )),
                }
            }
            time(&mut case, *op, &mut rivals, turns, calls)?;
            for mut rival in rivals {
                rival.times.sort_by(f64::total_cmp);
                found.measured.push(Measured {
                    set: set.name(),
                    dtype: E::DTYPE.as_str(),
                    op: op.name(),
                    calls: rival.times.len(),
                    median_ms: median(&rival.times),
                    min_ms: rival.times[0],
                    norm_error: rival.norm_error,
                    rival: rival.name,
                });
            }
        }
        Ok(())
    }
}

/// Who is timed, and its times.
struct Rival<'a> {
    name: String,
    who: Who<'a>,
    norm_error: Option<f64>,
    times: Vec<f64>,
}

enum Who<'a> {
    Ours(Impl),
    Peer(&'a mut Peer),
}

impl<'a> Rival<'a> {
    fn ours(of: Impl) -> Self {
        Self {
            name: of.name().to_owned(),
            who: Who::Ours(of),
            norm_error: None,
            times: Vec::new(),
        }
    }

    fn peer(name: String, peer: &'a mut Peer, norm_error: Option<f64>) -> Self {
        Self {
            name,
            who: Who::Peer(peer),
            norm_error,
            times: Vec::new(),
        }
    }

    fn fastest(&self) -> f64 {
        self.times.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

/// Rivals take turns of `calls` calls each, and the first of each round changes.
fn time<E: Element>(
    case: &mut Case<E>,
    op: Op,
    rivals: &mut [Rival],
    turns: usize,
    calls: usize,
) -> Result<()> {
    for turn in 0..turns {
        let fastest = rivals
            .iter()
            .map(Rival::fastest)
            .fold(f64::INFINITY, f64::min);
        for i in 0..rivals.len() {
            let len = rivals.len();
            let rival = &mut rivals[(turn + i) % len];
            let is_slow = turn > 0 && rival.fastest() > SLOW * fastest;
            let is_done = rival.times.iter().sum::<f64>() > PATIENCE_MS;
            if is_done || is_slow && !turn.is_multiple_of(ROUNDS_PER_SLOW) {
                continue;
            }
            match &mut rival.who {
                Who::Ours(of) => {
                    for _ in 0..calls {
                        rival.times.push(case.time(*of, op)?.as_secs_f64() * 1e3);
                    }
                }
                Who::Peer(peer) => rival.times.extend(
                    peer.time(calls)
                        .with_context(|| format!("{} cannot do it again", rival.name))?,
                ),
            }
        }
    }
    Ok(())
}

fn write(out: &Path, found: &Findings, threads: usize) -> Result<()> {
    let text = results::markdown(found, threads)?;
    println!("{text}");
    std::fs::write(out.join("RESULTS.md"), text)?;
    let mut lines = String::new();
    for measured in &found.measured {
        lines += &serde_json::to_string(measured)?;
        lines.push('\n');
    }
    std::fs::write(out.join("results.jsonl"), lines)?;
    plot::line_chart(&chart::compared(&found.measured), &out.join("results"))
}
