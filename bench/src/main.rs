//! How far `candle-grad-clip` is from the speed of memory, and from what users paste today.
//!
//! For every gradient set and operation: check the answers of all rivals, then time them
//! interleaved. `README.md` says what is timed and how to read the ratios.
#![deny(unsafe_code)]

mod answer;
mod calls;
mod case;
mod chart;
mod compare;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod element;
mod floor;
mod growth;
mod kept;
mod memory;
mod op;
mod oracle;
mod paste_in;
mod peer;
mod record;
mod results;
mod rival;
mod rules;
mod run;
mod sets;
mod threads;

use anyhow::Result;
use clap::{Parser, Subcommand};
use half::bf16;

use crate::compare::Compare;
use crate::growth::Growth;
use crate::kept::Kept;
use crate::record::Output;
use crate::rules::Rules;
use crate::run::time_set;
use crate::sets::Set;
use crate::threads::Threads;

/// Times gradient clipping beside pasted code and the floor: a plain loop over the same memory.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Print only JSON, one object a line.
    #[arg(long)]
    json: bool,
    /// Gradient sets: A one tensor of 64 Mi, B GPT-2's 148, C 10,000 small ones, D 30 of about 1 k.
    #[arg(long, value_delimiter = ',', default_value = "A,B,C,D")]
    sets: Vec<Set>,
    /// Threads of every rival [default: all cores].
    #[arg(long)]
    threads: Option<usize>,
    /// Timed calls of every rival [default: as many as make the set's medians stable].
    #[arg(long)]
    rounds: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Compare(Compare),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Cuda),
    Growth(Growth),
    Rules(Rules),
    #[command(hide = true)]
    Kept(Kept),
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Compare(compare)) => return compare.run(),
        #[cfg(feature = "cuda")]
        Some(Command::Cuda(cuda)) => return cuda.run(),
        Some(Command::Growth(growth)) => return growth.run(),
        Some(Command::Rules(rules)) => return rules.run(),
        Some(Command::Kept(kept)) => return kept.run(),
        None => {}
    }
    let threads = Threads::start(cli.threads)?;
    let mut output = Output::new(cli.json);
    for set in cli.sets {
        let rounds = cli.rounds.unwrap_or_else(|| set.rounds()).max(1);
        time_set::<f32>(set, threads, rounds, &mut output)?;
        if set == Set::B {
            time_set::<bf16>(set, threads, rounds, &mut output)?;
            time_set::<f64>(set, threads, rounds, &mut output)?;
        }
    }
    output.finish();
    Ok(())
}
