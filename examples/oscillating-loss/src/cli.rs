//! The command line.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Result, ensure};
use candle_grad_clip::{Clip, NonFinite};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

use crate::arm::Arm;
use crate::arms::Arms;
use crate::commands::study::{self, Study};
use crate::commands::{compare, find_max_norm, story, sweep, train};
use crate::experiment::Experiment;
use crate::out_dir::OutDir;
use crate::saves::Saves;
use crate::settings::{DeviceKind, OptimizerKind, Settings};
use crate::source::Source;

/// My weighted power loss oscillates: does gradient clipping help, how, and with which limit?
///
/// Trains a small transformer that forecasts tomorrow's maximum temperature. Without a command it
/// tells the whole story in a few minutes: the norms, one setting in full, a sweep of learning
/// rates, and a conclusion.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    story: Common,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One run, with one way of clipping.
    Train(TrainArgs),
    /// Some ways of clipping side by side: same initial weights, same batches.
    Compare {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        rate: Rate,
        #[command(flatten)]
        arms: ArmsArg,
    },
    /// Each way of clipping at several learning rates.
    Sweep {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        arms: ArmsArg,
        /// Learning rates, separated by commas.
        #[arg(long = "lr", value_delimiter = ',', value_parser = positive, default_values_t = sweep::RATES)]
        rates: Vec<f64>,
        /// Seeds for each, from --seed upwards.
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..), default_value_t = sweep::SEEDS)]
        seeds: u64,
    },
    /// Every way of clipping on both optimizers and two powers of the loss: hours. What is done
    /// already is not done again.
    Study(StudyArgs),
    /// The norms that training has without clipping, and what fraction each limit would clip.
    FindMaxNorm {
        #[command(flatten)]
        common: Common,
        /// A learning rate that is safe without clipping.
        #[arg(long, value_parser = positive, default_value_t = find_max_norm::SAFE_LR)]
        lr: f64,
    },
}

/// What all commands take.
#[derive(Debug, Args)]
struct Common {
    /// Which of the library's fused optimizers.
    #[arg(long, value_enum, default_value_t = OptimizerKind::Sgd)]
    optimizer: OptimizerKind,
    /// How much SGD keeps of its earlier steps, from 0 (nothing) to below 1; not for `AdamW`, which
    /// has its own.
    #[arg(long, value_name = "M", value_parser = share, default_value_t = 0.0)]
    momentum: f64,
    /// Exponent of the loss, mean(w |e|^power).
    #[arg(long, value_parser = at_least_one, default_value_t = 4.0)]
    power: f64,
    /// How much more extreme targets weigh: w = 1 + alpha |y|.
    #[arg(long, value_parser = not_negative, default_value_t = 4.0)]
    alpha: f64,
    /// Windows a step.
    #[arg(long, value_parser = count(), default_value = "32")]
    batch: u64,
    /// Steps of a run (find-max-norm: 100).
    #[arg(long, value_parser = count())]
    steps: Option<u64>,
    /// Steps between evaluations on the test windows.
    #[arg(long, value_parser = count(), default_value = "25")]
    eval_every: u64,
    /// Decides initial weights and batches.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What an arm that clips does with gradients that are NaN or infinite (`none` is unprotected).
    #[arg(long, value_parser = non_finite(), default_value = "skip")]
    non_finite: NonFinite,
    /// Where to train.
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// A CSV file of your own with a header, a row a day, instead of the weather: its numeric
    /// columns, standardised, are the inputs.
    #[arg(long, requires = "target", value_name = "FILE")]
    data: Option<PathBuf>,
    /// The column of --data to forecast.
    #[arg(long, requires = "data", value_name = "COLUMN")]
    target: Option<String>,
    /// Where results go [default: runs/<command>]. Files of an earlier call are replaced; a folder
    /// with files that this program did not write is refused.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Rate {
    /// Learning rate.
    #[arg(long, value_parser = positive, default_value_t = story::SHOWN_LR)]
    lr: f64,
}

#[derive(Debug, Args)]
struct TrainArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    rate: Rate,
    /// What to do to the gradients: `none`, `norm:MAX_NORM`, `value:CLIP_VALUE`, `auto`,
    /// `zclip:z_thresh=2,warmup=50`, or another rule as the library's `Clip` reads it.
    #[arg(long, default_value = "norm:1.0", value_name = "RULE")]
    clip: Arm,
    /// Saves a checkpoint in the results' folder every N steps, at the end and on Ctrl-C or
    /// SIGTERM; --resume continues from the last one. Those of an earlier run in this folder are
    /// removed.
    #[arg(long, value_name = "N", value_parser = count())]
    save_every: Option<u64>,
    /// Adds a histogram of each Var's gradient, before clipping, to the TensorBoard events every N
    /// steps. Not with checkpoints, which don't keep them.
    #[arg(long, value_name = "N", value_parser = count(), conflicts_with_all = ["save_every", "resume"])]
    histograms: Option<u64>,
    /// Goes on with the run whose results are in DIR, even if it was killed: all files become those
    /// of a run without a break, but for times. Of the other options it takes --save-every, and
    /// --steps to make the run longer.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "optimizer", "momentum", "power", "alpha", "batch",
        "eval_every", "seed", "non_finite", "device", "data", "lr", "clip"])]
    resume: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct StudyArgs {
    /// What to do to the gradients; see `sweep --help`.
    #[arg(long = "clip", default_value = study::ARMS, value_name = "RULES")]
    lists: Vec<Arms>,
    /// Which optimizers.
    #[arg(long = "optimizer", value_enum, value_delimiter = ',', default_values_t = [OptimizerKind::Sgd, OptimizerKind::AdamW])]
    optimizers: Vec<OptimizerKind>,
    /// Exponents of the loss.
    #[arg(long = "power", value_delimiter = ',', value_parser = at_least_one, default_values_t = study::POWERS)]
    powers: Vec<f64>,
    /// Learning rates [default: five, half a decade apart, around the best ones of the optimizer].
    #[arg(long = "lr", value_delimiter = ',', value_parser = positive)]
    rates: Vec<f64>,
    /// Seeds for each, from 0 upwards.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), default_value_t = study::SEEDS)]
    seeds: u64,
    /// In place of --lr: the N rates of each rule that were best with seed 0, of all that are done.
    #[arg(long, value_name = "N", value_parser = count(), conflicts_with = "rates")]
    best: Option<u64>,
    /// Steps of a run.
    #[arg(long, value_parser = count(), default_value_t = Settings::default().steps as u64)]
    steps: u64,
    /// Where the runs are kept.
    #[arg(long, value_name = "DIR", default_value = "bench/study")]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct ArmsArg {
    /// What to do to the gradients, separated by commas or in several --clip: `none`,
    /// `norm:MAX_NORM`, `value:CLIP_VALUE`, `auto`, `zclip:z_thresh=2,warmup=50`, or another rule as the
    /// library's `Clip` reads it. After a comma, `option=value` belongs to the rule before it.
    #[arg(long = "clip", default_value = Arms::STORY, value_name = "RULES")]
    lists: Vec<Arms>,
}

impl Common {
    /// Reads the data and proves that results can be written: all that can go wrong before
    /// training.
    fn experiment<'a>(&self, name: &str, interrupt: &'a AtomicBool) -> Result<Experiment<'a>> {
        let base = self.settings(&Arm::from(Clip::none()), story::SHOWN_LR);
        let out = self
            .out
            .clone()
            .unwrap_or_else(|| PathBuf::from("runs").join(name));
        experiment(&self.source()?, base, &out, interrupt)
    }

    fn settings(&self, arm: &Arm, lr: f64) -> Settings {
        Settings {
            arm: arm.clone(),
            non_finite: self.non_finite,
            optimizer: self.optimizer,
            momentum: self.momentum,
            lr,
            power: self.power,
            alpha: self.alpha,
            batch: self.batch as usize,
            steps: self
                .steps
                .map_or(Settings::default().steps, |steps| steps as usize),
            eval_every: self.eval_every as usize,
            seed: self.seed,
        }
    }

    fn source(&self) -> Result<Source> {
        let data = self.data.as_deref().zip(self.target.as_deref());
        Source::new(self.device, data)
    }
}

fn experiment<'a>(
    source: &Source,
    base: Settings,
    out: &Path,
    interrupt: &'a AtomicBool,
) -> Result<Experiment<'a>> {
    base.check()?;
    let weather = source.open()?;
    Experiment::new(weather, base, OutDir::create(out)?, interrupt)
}

/// Does what the command line says.
///
/// # Errors
/// If an input is wrong, a file can't be written or the device fails; a run that diverges is none.
pub fn run(cli: &Cli, interrupt: &AtomicBool) -> Result<()> {
    let experiment = match &cli.command {
        Some(Command::Study(args)) => return study(args, interrupt),
        None => {
            let experiment = cli.story.experiment("story", interrupt)?;
            story::run(&experiment)?;
            experiment
        }
        Some(Command::Train(args)) => match &args.resume {
            None => begin(args, interrupt)?,
            Some(folder) => resume(args, folder, interrupt)?,
        },
        Some(Command::Compare { common, rate, arms }) => {
            let arms = Arms::join(&arms.lists)?;
            let experiment = common.experiment("compare", interrupt)?;
            let plan = compare::plan(&experiment, &arms, rate.lr);
            experiment.write_config("compare", &plan)?;
            let runs = compare::run(&experiment, &plan)?;
            compare::write(&experiment, &runs)?;
            experiment
        }
        Some(Command::Sweep {
            common,
            arms,
            rates,
            seeds,
        }) => {
            let arms = Arms::join(&arms.lists)?;
            let experiment = common.experiment("sweep", interrupt)?;
            let plan = sweep::plan(&experiment, &arms, rates, *seeds);
            experiment.write_config("sweep", &plan)?;
            let runs = experiment.train_all(&plan, |_| Ok(None))?;
            sweep::report(&experiment, &runs, Vec::new())?;
            experiment
        }
        Some(Command::FindMaxNorm { common, lr }) => {
            let experiment = common.experiment("find-max-norm", interrupt)?;
            let steps = common
                .steps
                .map_or(find_max_norm::STEPS, |steps| steps as usize);
            let plan = find_max_norm::plan(&experiment, *lr, steps);
            experiment.write_config("find-max-norm", std::slice::from_ref(&plan))?;
            let unclipped = find_max_norm::run(&experiment, &plan)?;
            experiment.write_results(std::slice::from_ref(&unclipped.0))?;
            println!("{}", find_max_norm::report(&unclipped)?);
            experiment
        }
    };
    let out = experiment.out.path();
    println!("\nResults are in {}.", out.display());
    let page = std::path::absolute(out.join("index.html"))?;
    if page.exists() {
        println!("Open {} in a browser.", page.display());
    }
    Ok(())
}

fn study(args: &StudyArgs, interrupt: &AtomicBool) -> Result<()> {
    let study = Study {
        arms: Arms::join(&args.lists)?,
        optimizers: args.optimizers.clone(),
        powers: args.powers.clone(),
        rates: args.rates.clone(),
        seeds: args.seeds,
        steps: args.steps as usize,
    };
    let out = OutDir::create(&args.out)?;
    let weather = Source::new(DeviceKind::Cpu, None)?.open()?;
    let best = args.best.map(|count| count as usize);
    study::run(&study, best, &weather, &out, interrupt)
}

/// A new run.
fn begin<'a>(args: &TrainArgs, interrupt: &'a AtomicBool) -> Result<Experiment<'a>> {
    let experiment = args.common.experiment("train", interrupt)?;
    let settings = args.common.settings(&args.clip, args.rate.lr);
    let saves = match args.save_every {
        None => None,
        Some(every) => Some(Saves::begin(
            experiment.out.path(),
            every as usize,
            args.common.source()?,
        )?),
    };
    let histograms = args.histograms.map(|every| every as usize);
    train::run(&experiment, &settings, saves.as_ref(), histograms)?;
    Ok(experiment)
}

/// The rest of a run.
fn resume<'a>(args: &TrainArgs, out: &Path, interrupt: &'a AtomicBool) -> Result<Experiment<'a>> {
    let (mut settings, saves) = Saves::resume(out, args.save_every.map(|every| every as usize))?;
    if let Some(steps) = args.common.steps {
        let (steps, before) = (steps as usize, settings.steps);
        ensure!(
            steps >= before,
            "--steps {steps}: the run to resume has {before}, expected as many or more"
        );
        settings.steps = steps;
    }
    let experiment = experiment(&saves.source, settings.clone(), out, interrupt)?;
    train::run(&experiment, &settings, Some(&saves), None)?;
    Ok(experiment)
}

fn non_finite() -> impl TypedValueParser<Value = NonFinite> {
    PossibleValuesParser::new(["error", "skip", "zero", "propagate"]).map(|text| match &*text {
        "error" => NonFinite::Error,
        "zero" => NonFinite::Zero,
        "propagate" => NonFinite::Propagate,
        _ => NonFinite::SkipStep,
    })
}

fn count() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=u64::from(u32::MAX))
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, "a number above 0", |value| value > 0.0)
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, "a number, 0 or above", |value| value >= 0.0)
}

fn share(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to below 1", |value| {
        (0.0..1.0).contains(&value)
    })
}

fn at_least_one(text: &str) -> Result<f64, String> {
    number(text, "a number, 1 or above", |value| value >= 1.0)
}

fn number(text: &str, expected: &str, right: fn(f64) -> bool) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && right(value) => Ok(value),
        _ => Err(format!("expected {expected}")),
    }
}
