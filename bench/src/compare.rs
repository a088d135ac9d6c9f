//! Ours and other frameworks in turn, in one run: answers first, then times.

use std::path::{Path, PathBuf};

use anyhow::Result;
use half::bf16;

use crate::answer::Question;
use crate::case::Case;
use crate::element::Element;
use crate::op::{Impl, Op, PASTE_IN_KEPT};
use crate::peer::{Known, Peer};
use crate::record::{Findings, Measured, median};
use crate::rival::{Rival, take_turns};
use crate::sets::Set;
use crate::timing::Threads;
use crate::{chart, kept, results};

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

impl Compare {
    pub(crate) fn run(&self) -> Result<()> {
        std::fs::create_dir_all(&self.out)?; // now, not after all the timing
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
                eprintln!("{} {}", set.name(), PASTE_IN_KEPT);
                let kept = kept::time(set, threads.count())?;
                found.add_beside(kept);
            }
        }
        write(&self.out, &found, threads.count())
    }

    /// Measures a set, with as many frameworks at a time as memory holds.
    fn set<E: Element>(
        &self,
        set: Set,
        ops: &[Op],
        peers: &mut [Peer],
        found: &mut Findings,
    ) -> Result<()> {
        let mut case = Case::<E>::new(set)?;
        let mut active: Vec<&mut Peer> = Vec::new();
        for peer in peers {
            match reason_against::<E>(peer, set, ops) {
                Some(reason) => found.note(format!("{}: {reason}", peer.hello.peer)),
                None => active.push(peer),
            }
        }
        let at_once = set.peers_at_once();
        let are_many = active.len() > at_once;
        if are_many {
            empty(&mut active, found);
        }
        let mut groups: Vec<&mut [&mut Peer]> = active.chunks_mut(at_once).collect();
        if groups.is_empty() {
            groups.push(&mut []); // ours alone
        }
        let mut ours = Impl::ALL.to_vec();
        let mut rows: Vec<Row> = Vec::new();
        for group in groups {
            for peer in group.iter_mut() {
                if let Err(error) = peer.load::<E>(set) {
                    found.note(format!("{}: no {}: {error:#}", peer.hello.peer, set.name()));
                }
            }
            for op in ops {
                eprintln!("{} {} {}", set.name(), E::DTYPE.as_str(), op.name());
                for rival in self.time(&mut case, set, *op, &ours, group, found)? {
                    Row::add(&mut rows, *op, rival);
                }
            }
            // Once is enough for who takes so long.
            ours.retain(|of| *of != Impl::PasteIn);
            if are_many {
                empty(group, found);
            }
        }
        let dtype = E::DTYPE.as_str();
        let measured = rows.into_iter().map(|row| row.measured(set, dtype));
        found.measured.extend(measured);
        Ok(())
    }

    /// Checks and times an operation.
    fn time<'a, E: Element>(
        &self,
        case: &mut Case<E>,
        set: Set,
        op: Op,
        ours: &[Impl],
        peers: &'a mut [&mut Peer],
        found: &mut Findings,
    ) -> Result<Vec<Rival<'a>>> {
        for of in ours {
            case.check(*of, op)?;
        }
        case.prepare(op)?;
        if op.is_step() {
            // The first makes the moments; peers take theirs in the check.
            for of in ours {
                case.time(*of, op)?;
            }
        }
        let mut rivals: Vec<Rival> = ours.iter().copied().map(Rival::ours).collect();
        for peer in peers.iter_mut().filter(|peer| peer.has::<E>(op)) {
            let question = Question::new::<E>(&set.shapes(), op, peer.hello.clips_each_tensor);
            let answer = peer.check(op, question.max_norm);
            match answer.and_then(|answer| question.check::<E>(&answer)) {
                Ok(norm_error) => rivals.push(Rival::peer(peer, norm_error)),
                Err(error) => found.note(format!(
                    "{}: {} on {} is not right: {error:#}",
                    peer.hello.peer,
                    op.name(),
                    set.name()
                )),
            }
        }
        let (turns, calls) = set.turns();
        take_turns(
            case,
            op,
            &mut rivals,
            self.rounds.unwrap_or(turns).max(1),
            calls,
        )?;
        for rival in &rivals {
            if let Some(failure) = &rival.failure {
                found.note(format!("{} on {}: {failure}", rival.name, set.name()));
            }
        }
        Ok(rivals)
    }
}

/// Starts frameworks anew: what a process gives back of its memory is less than it has.
fn empty(peers: &mut [&mut Peer], found: &mut Findings) {
    for peer in peers {
        if let Err(error) = peer.restart() {
            found.note(format!("{}: {error:#}", peer.hello.peer));
        }
    }
}

/// Why a framework is not even asked.
fn reason_against<E: Element>(peer: &Peer, set: Set, ops: &[Op]) -> Option<String> {
    let tensors = set.shapes().len();
    if peer.hello.max_tensors.is_some_and(|max| max < tensors) {
        let set = set.name();
        return Some(format!(
            "not on {set}, as it compiles {tensors} tensors for too long"
        ));
    }
    let has_some = ops.iter().any(|op| peer.has::<E>(*op));
    (!has_some).then(|| format!("not in {}", E::DTYPE.as_str()))
}

/// A rival's times for an operation, from all groups it was in.
struct Row {
    op: Op,
    rival: String,
    norm_error: Option<f64>,
    times: Vec<f64>,
}

impl Row {
    fn add(rows: &mut Vec<Self>, op: Op, rival: Rival) {
        let mut same = rows.iter_mut().filter(|row| row.op == op);
        if let Some(row) = same.find(|row| row.rival == rival.name) {
            row.times.extend(rival.times);
        } else if !rival.times.is_empty() {
            rows.push(Self {
                op,
                rival: rival.name,
                norm_error: rival.norm_error,
                times: rival.times,
            });
        }
    }

    fn measured(mut self, set: Set, dtype: &'static str) -> Measured {
        self.times.sort_by(f64::total_cmp);
        Measured {
            set: set.name(),
            dtype,
            op: self.op.name(),
            rival: self.rival,
            calls: self.times.len(),
            median_ms: median(&self.times),
            min_ms: self.times[0],
            norm_error: self.norm_error,
        }
    }
}

fn write(out: &Path, found: &Findings, threads: usize) -> Result<()> {
    let text = results::markdown(found, threads)?;
    println!("{text}");
    let table = std::fs::write(out.join("RESULTS.md"), text);
    let mut lines = String::new();
    for measured in &found.measured {
        lines += &serde_json::to_string(measured)?;
        lines.push('\n');
    }
    // What can't be written costs nothing else.
    let numbers = std::fs::write(out.join("results.jsonl"), lines);
    let chart = plot::line_chart(&chart::compared(&found.measured), &out.join("results"));
    table?;
    numbers?;
    chart
}
