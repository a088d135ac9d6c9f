//! Ours and other frameworks in turn, in one run: answers first, then times.

use std::path::{Path, PathBuf};

use anyhow::Result;
use half::bf16;

use crate::case::Case;
use crate::element::Element;
use crate::op::{Impl, Op, PASTE_IN_KEPT};
use crate::peer::{Known, Peer};
use crate::record::Findings;
use crate::rival::{Plan, Rival, Times, measure};
use crate::sets::Set;
use crate::threads::Threads;
use crate::{kept, results};

/// Times other frameworks too, those that are installed, and writes RESULTS.md.
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
    /// Where Python's environments are: venv-pytorch, venv-tensorflow, venv-optax [default: the
    /// system's temporary folder].
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
        let mut case = Case::<E, _>::of_set(set)?;
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
        let mut rows: Vec<(Op, Times)> = Vec::new();
        for group in groups {
            for peer in group.iter_mut() {
                if let Err(error) = peer.load::<E>(set) {
                    found.note(format!("{}: no {}: {error:#}", peer.hello.peer, set.name()));
                }
            }
            for op in ops {
                eprintln!("{} {} {}", set.name(), E::DTYPE.as_str(), op.name());
                let mut rivals: Vec<&mut dyn Rival<_>> = Vec::new();
                rivals.extend(ours.iter_mut().map(|of| of as &mut dyn Rival<_>));
                let peers = group.iter_mut().filter(|peer| peer.has::<E>(*op));
                rivals.extend(peers.map(|peer| &mut **peer as &mut dyn Rival<_>));
                let mut note = |note| found.note(format!("{}: {note}", set.name()));
                let plan = self.plan(set, *op);
                let timed = measure(&mut case, *op, rivals, &plan, &mut note)?;
                for times in timed {
                    add(&mut rows, *op, times);
                }
            }
            // Once is enough for who takes so long.
            ours.retain(|of| *of != Impl::PasteIn);
            if are_many {
                empty(group, found);
            }
        }
        let measured = rows.into_iter();
        let measured = measured.map(|(op, times)| times.measured::<E>(set, op));
        found.measured.extend(measured);
        Ok(())
    }

    fn plan(&self, set: Set, op: Op) -> Plan {
        let (turns, calls) = set.turns();
        Plan {
            // The first step makes the moments.
            warm_ups: usize::from(op.is_step()),
            calls,
            spares_slow: true,
            ..Plan::new(self.rounds.unwrap_or(turns).max(1))
        }
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

/// Adds a rival's times for an operation to those from other groups.
fn add(rows: &mut Vec<(Op, Times)>, op: Op, times: Times) {
    let mut same = rows.iter_mut().filter(|(of, _)| *of == op);
    match same.find(|(_, row)| row.name == times.name) {
        Some((_, row)) => row.ms.extend(times.ms),
        None => rows.push((op, times)),
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
    table?;
    Ok(numbers?)
}
