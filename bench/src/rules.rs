//! What each rule costs beside the plain norm clip: a step of a fused optimizer with either.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::Optimizer;
use rayon::prelude::*;

use crate::cpu::Other;
use crate::memory::with_elements;
use crate::op::{CLIP_COEF, CLIP_VALUE, LR, PARAMS_SCALE, PARAMS_START, params_adamw, uniform};
use crate::oracle;
use crate::record::median;
use crate::results::machine;
use crate::sets::Set;
use crate::threads::Threads;

/// Steps before the clock starts: moments are made, warm-ups over, histories begun.
const WARM_UP: usize = 8;

/// Times a step of AdamW and of SGD with each rule beside one with the plain norm clip, and writes
/// RULES.md.
#[derive(Debug, clap::Args)]
pub(crate) struct Rules {
    /// Gradient sets.
    #[arg(long, value_delimiter = ',', default_value = "B,C,D")]
    sets: Vec<Set>,
    /// Threads [default: all cores].
    #[arg(long)]
    threads: Option<usize>,
    /// Timed steps of each [default: as many as make the set's medians stable].
    #[arg(long)]
    rounds: Option<usize>,
    /// Where RULES.md goes.
    #[arg(long, default_value = env!("CARGO_MANIFEST_DIR"))]
    out: PathBuf,
}

/// One rule's steps.
struct Timed {
    rule: &'static str,
    optimizer: &'static str,
    set: Set,
    median_ms: f64,
    /// To the plain clip's, timed in turn.
    ratio: f64,
}

/// A set's parameters and gradients, which no fused step changes.
struct Model {
    vars: Vec<Var>,
    grads: GradStore,
    total_norm: f64,
    /// The root mean square of the Vars' norms: below some, above others.
    param_norm: f64,
    other: Other,
}

impl Rules {
    pub(crate) fn run(&self) -> Result<()> {
        std::fs::create_dir_all(&self.out)?; // now, not after all the timing
        let threads = Threads::start(self.threads)?.count();
        let mut all = Vec::new();
        for set in &self.sets {
            let model = Model::new(*set)?;
            let rounds = self.rounds.unwrap_or_else(|| set.rounds()).max(1);
            for (name, clip) in model.rules()? {
                model.check(name, &clip)?;
                let mut times = |optimizer, [plain, ours]: [f64; 2]| {
                    eprintln!("{} {optimizer} {name}: {:.3}", set.name(), ours / plain);
                    all.push(Timed {
                        rule: name,
                        optimizer,
                        set: *set,
                        median_ms: ours,
                        ratio: ours / plain,
                    });
                };
                times(
                    "AdamW",
                    model.time::<AdamW>(&params_adamw(), &clip, rounds)?,
                );
                times("SGD", model.time::<Sgd>(&LR.into(), &clip, rounds)?);
            }
        }
        let text = markdown(&all, &self.sets, threads)?;
        println!("{text}");
        Ok(std::fs::write(self.out.join("RULES.md"), text)?)
    }
}

impl Model {
    fn new(set: Set) -> Result<Self> {
        let (mut vars, mut grads) = (Vec::new(), GradStore::default());
        let (mut start, mut powers) = (0, Vec::new());
        for shape in set.shapes() {
            let len = shape.iter().product::<usize>() as u64;
            let values = |start: u64, scale: f64| -> Vec<f32> {
                let indices = (start..start + len).into_par_iter();
                indices.map(|i| (scale * uniform(i)) as f32).collect()
            };
            let param = values(PARAMS_START + start, PARAMS_SCALE);
            let var = Var::from_vec(param, shape.as_slice(), &Device::Cpu)?;
            let grad = values(start, 1.0);
            powers.push(oracle::l2_norm(grad.iter().map(|g| f64::from(*g))).powi(2));
            grads.insert(
                &var,
                Tensor::from_vec(grad, shape.as_slice(), &Device::Cpu)?,
            );
            vars.push(var);
            start += len;
        }
        let power: f64 = powers.iter().sum();
        Ok(Self {
            total_norm: power.sqrt(),
            param_norm: (power / powers.len() as f64).sqrt(),
            vars,
            grads,
            other: Other::new(set.is_cold()),
        })
    }

    /// Every rule, with limits that these gradients are above, where it has one.
    fn rules(&self) -> Result<Vec<(&'static str, Clip)>> {
        let (max_norm, param_norm) = (CLIP_COEF * self.total_norm, self.param_norm);
        let texts = [
            ("norm", format!("norm:{max_norm}")),
            ("none", "none".into()),
            ("value", format!("value:{CLIP_VALUE}")),
            ("param-norm", format!("param-norm:{param_norm}")),
            ("block-rms", "block-rms:0.5".into()), // of 0.577
            ("auto", "auto".into()),
            ("quantile", "quantile".into()),
            ("zclip", format!("zclip:warmup=3,max_norm={max_norm}")),
            ("adagc", "adagc:warmup=3".into()),
            ("agc", "agc".into()),
            ("stabilizer", "stabilizer".into()),
            ("skip", "skip".into()),
            (
                "value + norm",
                format!("value:{CLIP_VALUE}+norm:{max_norm}"),
            ),
        ];
        let parse = |(name, text): (_, String)| Ok((name, text.parse()?));
        texts.into_iter().map(parse).collect()
    }

    fn optimizer<O: Optimizer + 'static>(
        &self,
        config: O::Config,
        clip: &Clip,
    ) -> Result<ClippedOptimizer<O>> {
        let inner = O::new(self.vars.clone(), config)?;
        Ok(ClippedOptimizer::wrap(
            inner,
            self.vars.clone(),
            clip.clone(),
        )?)
    }

    /// Takes steps of SGD with a learning rate of 1: each must move the parameters as far as its
    /// report says that the clipped gradients reach, and the norm before must be right.
    fn check(&self, name: &str, clip: &Clip) -> Result<()> {
        let mut optimizer = self.optimizer::<Sgd>(1.0.into(), clip)?;
        for step in 1..=WARM_UP {
            let before = self.params()?;
            let report = optimizer.step_report(&self.grads)?;
            let (norm, clipped) = (report.total_norm()?, report.record()?.clipped_norm);
            let error = (norm / self.total_norm - 1.0).abs();
            ensure!(
                error <= 1e-12,
                "{name}: the norm is {norm}, not {}",
                self.total_norm
            );
            if step == 1 || step == WARM_UP {
                let moved = self.distance(&before)?;
                ensure!(
                    (moved / clipped - 1.0).abs() <= 1e-3,
                    "{name}: step {step} moves by {moved}, but its clipped norm is {clipped}"
                );
            }
        }
        Ok(())
    }

    fn params(&self) -> Result<Vec<Vec<f32>>> {
        let vars: Vec<&Tensor> = self.vars.iter().map(Var::as_tensor).collect();
        with_elements::<f32, _>(&vars, |elements| {
            let copies = elements.into_par_iter();
            copies.map(|slice| slice.to_vec()).collect()
        })
    }

    /// From where the parameters were to where they are.
    fn distance(&self, before: &[Vec<f32>]) -> Result<f64> {
        let after = self.params()?;
        let pairs = before.par_iter().zip(&after);
        let power = |(before, after): (&Vec<f32>, &Vec<f32>)| -> f64 {
            let moved = before.iter().zip(after);
            moved
                .map(|(b, a)| (f64::from(*a) - f64::from(*b)).powi(2))
                .sum()
        };
        Ok(pairs
            .map(power)
            .collect::<Vec<f64>>()
            .iter()
            .sum::<f64>()
            .sqrt())
    }

    /// Median milliseconds of a step with the plain clip and with `clip`, in turn.
    fn time<O: Optimizer + 'static>(
        &self,
        config: &O::Config,
        clip: &Clip,
        rounds: usize,
    ) -> Result<[f64; 2]>
    where
        O::Config: Clone,
    {
        let plain = Clip::norm(CLIP_COEF * self.total_norm);
        let mut optimizers = [
            self.optimizer::<O>(config.clone(), &plain)?,
            self.optimizer::<O>(config.clone(), clip)?,
        ];
        let mut times = [const { Vec::new() }; 2];
        for round in 0..WARM_UP + rounds {
            for turn in 0..2 {
                let which = (round + turn) % 2;
                self.other.read()?;
                let start = Instant::now();
                let norm = optimizers[which].step_report(&self.grads)?.total_norm()?;
                let elapsed = start.elapsed();
                ensure!(
                    (norm / self.total_norm - 1.0).abs() <= 1e-12,
                    "the norm is {norm}"
                );
                if round >= WARM_UP {
                    times[which].push(elapsed.as_secs_f64() * 1e3);
                }
            }
        }
        Ok(times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            median(&times)
        }))
    }
}

fn markdown(all: &[Timed], sets: &[Set], threads: usize) -> Result<String> {
    let mut text = String::from("# What each rule costs\n\n");
    writeln!(
        text,
        "Written by `cargo run --release -p bench -- rules`; README.md says how.\n"
    )?;
    writeln!(
        text,
        "- Date: {}",
        jiff::Timestamp::now().strftime("%Y-%m-%d")
    )?;
    writeln!(text, "- Machine: {}, {threads} threads\n", machine())?;
    writeln!(
        text,
        "A step with the rule, as a multiple of one with `norm` timed in turn, and its milliseconds:\n"
    )?;
    let columns: Vec<(&str, Set)> = ["AdamW", "SGD"]
        .into_iter()
        .flat_map(|optimizer| sets.iter().map(move |set| (optimizer, *set)))
        .collect();
    let header: Vec<String> = columns
        .iter()
        .map(|(optimizer, set)| format!("{optimizer}, {}", set.name()))
        .collect();
    writeln!(
        text,
        "| rule | {} |\n|---|{}",
        header.join(" | "),
        "---:|".repeat(columns.len())
    )?;
    let mut names: Vec<&str> = all.iter().map(|timed| timed.rule).collect();
    names.dedup();
    names.truncate(names.len() / sets.len().max(1));
    for name in names {
        let cell = |(optimizer, set): &(&str, Set)| {
            let timed = all.iter().find(|timed| {
                timed.rule == name && timed.optimizer == *optimizer && timed.set == *set
            });
            timed.map_or(String::new(), |timed| {
                format!("{:.2} ({:.3})", timed.ratio, timed.median_ms)
            })
        };
        let cells: Vec<String> = columns.iter().map(cell).collect();
        writeln!(text, "| `{name}` | {} |", cells.join(" | "))?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_does_what_it_reports() -> Result<()> {
        let model = Model::new(Set::D)?;
        for (name, clip) in model.rules()? {
            model.check(name, &clip)?;
        }
        Ok(())
    }

    #[test]
    fn a_wrong_norm_is_found() -> Result<()> {
        let mut model = Model::new(Set::D)?;
        model.total_norm *= 1.0 + 1e-9;
        assert!(model.check("norm", &Clip::norm(1.0)).is_err());
        Ok(())
    }

    #[test]
    fn a_row_a_rule_and_a_column_a_set() -> Result<()> {
        let timed = |rule, set, ratio| Timed {
            rule,
            optimizer: "SGD",
            set,
            median_ms: 2.0,
            ratio,
        };
        let all = [
            timed("norm", Set::C, 1.0),
            timed("agc", Set::C, 1.5),
            timed("norm", Set::D, 0.99),
            timed("agc", Set::D, 3.0),
        ];
        let text = markdown(&all, &[Set::C, Set::D], 2)?;
        assert!(
            text.contains("| rule | AdamW, C | AdamW, D | SGD, C | SGD, D |"),
            "{text}"
        );
        assert!(text.ends_with("| `norm` |  |  | 1.00 (2.000) | 0.99 (2.000) |\n| `agc` |  |  | 1.50 (2.000) | 3.00 (2.000) |\n"), "{text}");
        Ok(())
    }
}
